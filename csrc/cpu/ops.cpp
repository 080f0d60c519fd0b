// The schemas of all ops, and their CPU kernels.
#include "fp8_tiles.h"
#include "kimi/glue.h"

namespace {

using namespace kimi;

// Rows for one thread at least: below this, starting threads costs more than it saves.
constexpr int64_t kElementsForAThread = 1 << 15;

template <class Body>
void over_rows(int64_t rows, int64_t width, Body body) {
  const int64_t grain = std::max<int64_t>(1, kElementsForAThread / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
    body(from, to - from);
  });
}

struct Cpu {
  struct Scope {
    explicit Scope(int32_t) {}
    void check() const {}
    void* stream = nullptr;
  };

  template <class T>
  static void quantise_tiles(const T* x, uint8_t* q, float* scale, int64_t rows, int64_t width,
                             void*) {
    const int64_t tiles = (width + kTile - 1) / kTile;
    over_rows(rows, width, [=](int64_t row, int64_t count) {
      cpu::run<cpu::QuantiseTiles<T>>(x + row * width, q + row * width, scale + row * tiles, count,
                                      width);
    });
  }

  template <class T>
  static void dequantise_tiles(const uint8_t* q, const float* scale, T* x, int64_t rows,
                               int64_t width, void*) {
    const int64_t tiles = (width + kTile - 1) / kTile;
    over_rows(rows, width, [=](int64_t row, int64_t count) {
      cpu::run<cpu::DequantiseTiles<T>>(q + row * width, scale + row * tiles, x + row * width,
                                        count, width);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(kimi_pretrain, m) {
  m.def("quantise_tiles(Tensor x) -> (Tensor, Tensor)");
  m.def("dequantise_tiles(Tensor q, Tensor scale, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_pretrain, CPU, m) { kimi::implement<Cpu>(m); }

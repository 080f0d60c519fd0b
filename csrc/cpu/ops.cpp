// The schemas of all ops, and their CPU kernels.
#include "fp8_tiles.h"
#include "kimi/glue.h"
#include "max_logits.h"
#include "permute.h"
#include "rms_norm.h"
#include "swiglu.h"

namespace {

using namespace kimi;

// Rows for one thread at least: below this, starting threads costs more than it saves.
constexpr int64_t kElementsForAThread = 1 << 15;

template <class Body>
void over_rows(int64_t rows, int64_t width, Body body) {
  const int64_t grain = std::max<int64_t>(1, kElementsForAThread / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, body);
}

struct Cpu {
  struct Scope {
    explicit Scope(int32_t) {}
    void check() const {}
    void* stream = nullptr;
  };

  // Strips of rows whose sums are taken apart; the threads at hand do not change them.
  static int64_t strips(int64_t rows) { return std::min<int64_t>((rows + 31) / 32, 64); }

  // Queries whose maximum is taken together: enough to pay for turning the keys over.
  static constexpr int64_t kQueries = 256;
  static int64_t logit_blocks(int64_t length) { return (length + kQueries - 1) / kQueries; }

  template <class T>
  static void quantise_tiles(const T* x, uint8_t* q, float* scale, int64_t rows, int64_t width,
                             void*) {
    over_rows(rows, width, [=](int64_t from, int64_t to) {
      cpu::run<cpu::QuantiseTiles<T>>(x + from * width, q + from * width,
                                      scale + from * tiles_of(width), to - from, width);
    });
  }

  template <class T>
  static void dequantise_tiles(const uint8_t* q, const float* scale, T* x, int64_t rows,
                               int64_t width, void*) {
    over_rows(rows, width, [=](int64_t from, int64_t to) {
      cpu::run<cpu::DequantiseTiles<T>>(q + from * width, scale + from * tiles_of(width),
                                        x + from * width, to - from, width);
    });
  }

  template <class T>
  static void swiglu(const T* gate_up, T* y, int64_t rows, int64_t width, void*) {
    swiglu_rows(cpu::DenseRows<T>{gate_up, 2 * width}, y, rows, width);
  }

  template <class T>
  static void swiglu_tiles(const uint8_t* q, const float* scale, T* y, int64_t rows, int64_t width,
                           void*) {
    swiglu_rows(cpu::TileRows{q, scale, 2 * width}, y, rows, width);
  }

  template <class T>
  static void swiglu_backward(const T* grad, const T* gate_up, T* grad_gate_up, int64_t rows,
                              int64_t width, void*) {
    swiglu_backward_rows(grad, cpu::DenseRows<T>{gate_up, 2 * width}, grad_gate_up, rows, width);
  }

  template <class T>
  static void swiglu_tiles_backward(const T* grad, const uint8_t* q, const float* scale,
                                    T* grad_gate_up, int64_t rows, int64_t width, void*) {
    swiglu_backward_rows(grad, cpu::TileRows{q, scale, 2 * width}, grad_gate_up, rows, width);
  }

  template <class T>
  static void rms_norm(const T* x, const T* weight, float eps, T* y, float* scale, int64_t rows,
                       int64_t width, void*) {
    over_rows(rows, width, [=](int64_t from, int64_t to) {
      cpu::run<cpu::RmsNorm<T>>(x + from * width, weight, eps, y + from * width, scale + from,
                                to - from, width);
    });
  }

  template <class T>
  static void rms_norm_backward(const T* grad, const T* x, const T* weight, const float* scale,
                                T* grad_x, float* partial, float* grad_weight, int64_t rows,
                                int64_t width, void*) {
    const int64_t count = strips(rows);
    torch::stable::parallel_for(0, count, 1, [=](int64_t first, int64_t last) {
      for (int64_t strip = first; strip < last; strip++) {
        const int64_t from = rows * strip / count, to = rows * (strip + 1) / count;
        const int64_t begin = from * width;
        float* sums = partial + strip * width;
        std::fill_n(sums, width, 0.0f);
        cpu::run<cpu::RmsNormBackward<T>>(grad + begin, x + begin, weight, scale + from,
                                          grad_x + begin, sums, to - from, width);
      }
    });
    for (int64_t strip = 0; strip < count; strip++)
      for (int64_t i = 0; i < width; i++) grad_weight[i] += partial[strip * width + i];
  }

  static void check_index(const Tensor& index, int64_t count) {
    const int64_t* at = in<int64_t>(index);
    const bool inside = std::all_of(at, at + index.numel(),
                                    [count](int64_t i) { return 0 <= i && i < count; });
    KIMI_CHECK(inside, "order and inverse must hold numbers of slots and rows");
  }

  template <class T>
  static void take_rows(const T* x, const int64_t* order, T* rows, int64_t tokens, int64_t slots,
                        int64_t width, void*) {
    over_rows(tokens * slots, width, [=](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++)
        std::copy_n(x + order[row] / slots * width, width, rows + row * width);
    });
  }

  template <class T>
  static void weighted_rows(const T* rows, const float* weights, const int64_t* inverse, T* y,
                            int64_t tokens, int64_t slots, int64_t width, void*) {
    over_rows(tokens, slots * width, [=](int64_t from, int64_t to) {
      cpu::run<cpu::WeightedRows<T>>(rows, weights, inverse, y, from, to, slots, width);
    });
  }

  template <class T>
  static void weighted_rows_backward(const T* grad, const T* rows, const float* weights,
                                     const int64_t* order, T* grad_rows, float* grad_weights,
                                     int64_t tokens, int64_t slots, int64_t width, void*) {
    over_rows(tokens * slots, width, [=](int64_t from, int64_t to) {
      cpu::run<cpu::WeightedRowsBackward<T>>(grad, rows, weights, order, grad_rows, grad_weights,
                                             from, to, slots, width);
    });
  }

  template <class T>
  static void max_logits(const T* q, const T* k, const int64_t* documents, const bool* chosen,
                         float scale, float* partial, float* largest, int64_t sequences,
                         int64_t heads, int64_t length, int64_t width, void*) {
    const int64_t blocks = logit_blocks(length), size = length * width;
    torch::stable::parallel_for(0, sequences * heads * blocks, 1, [=](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at++) {
        const int64_t pair = at / blocks, from = at % blocks * kQueries;
        if (!chosen[pair % heads]) continue;
        cpu::run<cpu::MaxLogits<T>>(
            q + pair * size, k + pair * size,
            documents ? documents + pair / heads * length : nullptr, scale, partial + at, from,
            std::min(from + kQueries, length), width);
      }
    });
    std::fill_n(largest, heads, -INFINITY);
    for (int64_t at = 0; at < sequences * heads * blocks; at++) {
      const int64_t head = at / blocks % heads;
      if (chosen[head]) largest[head] = cpu::larger(largest[head], partial[at]);
    }
  }

 private:
  template <class Rows, class T>
  static void swiglu_rows(Rows source, T* y, int64_t rows, int64_t width) {
    over_rows(rows, 2 * width, [=](int64_t from, int64_t to) {
      cpu::run<cpu::Swiglu<Rows, T>>(source, y, from, to, width);
    });
  }

  template <class Rows, class T>
  static void swiglu_backward_rows(const T* grad, Rows source, T* grad_gate_up, int64_t rows,
                                   int64_t width) {
    over_rows(rows, 2 * width, [=](int64_t from, int64_t to) {
      cpu::run<cpu::SwigluBackward<Rows, T>>(grad, source, grad_gate_up, from, to, width);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(kimi_pretrain, m) {
  m.def("quantise_tiles(Tensor x) -> (Tensor, Tensor)");
  m.def("dequantise_tiles(Tensor q, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  m.def("swiglu_tiles(Tensor q, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("swiglu_tiles_backward(Tensor grad, Tensor q, Tensor scale) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) "
      "-> (Tensor, Tensor)");
  m.def("take_rows(Tensor x, Tensor order, Tensor inverse) -> Tensor");
  m.def("summed_rows(Tensor rows, Tensor order, Tensor inverse) -> Tensor");
  m.def("weighted_rows(Tensor rows, Tensor weights, Tensor order, Tensor inverse) -> Tensor");
  m.def(
      "weighted_rows_backward(Tensor grad, Tensor rows, Tensor weights, Tensor order, "
      "Tensor inverse) -> (Tensor, Tensor)");
  m.def(
      "max_logits(Tensor q, Tensor k, float scale, Tensor? document_ids, Tensor chosen) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_pretrain, CPU, m) { kimi::implement<Cpu>(m); }

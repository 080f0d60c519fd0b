// From torch's tensors to plain pointers: checks, allocation and choice of type, once for every
// backend. Only torch's stable ABI is used, so one build serves later versions of torch.
//
// A backend has one function an op, and `Scope(device)`: its `stream` is what the functions take
// last, its `check` reports what went wrong.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <tuple>
#include <vector>

#include "kimi/numeric.h"

namespace kimi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define KIMI_CHECK(condition, ...) STD_TORCH_CHECK(condition, "kimi_pretrain: ", __VA_ARGS__)

inline void check_dense(const Tensor& x, const char* name) {
  KIMI_CHECK(x.is_contiguous(), name, " must be contiguous");
  KIMI_CHECK(x.dim() >= 1, name, " must have a dimension");
}

inline void check_like(const Tensor& x, const Tensor& like, const char* name) {
  check_dense(x, name);
  KIMI_CHECK(x.scalar_type() == like.scalar_type(), name, " has another dtype");
  KIMI_CHECK(x.get_device_index() == like.get_device_index(), name, " is on another device");
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// The shape of x with another last dimension.
inline std::vector<int64_t> with_width(const Tensor& x, int64_t width) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = width;
  return shape;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

template <class T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls body(T{}) for the element type of `dtype`: bf16 or float.
template <class Body>
void with_type(ScalarType dtype, Body body) {
  if (dtype == ScalarType::BFloat16) return body(bf16{});
  KIMI_CHECK(dtype == ScalarType::Float, "the dtype must be bfloat16 or float32");
  body(float{});
}

// x [..., width] -> (q [..., width] E4M3, scale [..., ceil(width / 128)] fp32).
template <class Backend>
std::tuple<Tensor, Tensor> quantise_tiles(const Tensor& x) {
  check_dense(x, "x");
  const int64_t width = x.size(-1), tiles = (width + kTile - 1) / kTile;
  Tensor q = empty(x, shape_of(x), ScalarType::Float8_e4m3fn);
  Tensor scale = empty(x, with_width(x, tiles), ScalarType::Float);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if (x.numel() == 0) return;
    typename Backend::Scope scope(x.get_device_index());
    Backend::quantise_tiles(in<T>(x), out<uint8_t>(q), out<float>(scale), x.numel() / width, width,
                            scope.stream);
    scope.check();
  });
  return {q, scale};
}

// The way back, to bf16 or fp32.
template <class Backend>
Tensor dequantise_tiles(const Tensor& q, const Tensor& scale, ScalarType dtype) {
  check_dense(q, "q");
  check_dense(scale, "scale");
  const int64_t width = q.size(-1), tiles = (width + kTile - 1) / kTile;
  KIMI_CHECK(q.scalar_type() == ScalarType::Float8_e4m3fn, "q must be float8_e4m3fn");
  KIMI_CHECK(scale.scalar_type() == ScalarType::Float, "scale must be float32");
  KIMI_CHECK(shape_of(scale) == with_width(q, tiles), "scale must hold one number a tile of q");
  Tensor x = empty(q, shape_of(q), dtype);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    if (q.numel() == 0) return;
    typename Backend::Scope scope(q.get_device_index());
    Backend::dequantise_tiles(in<uint8_t>(q), in<float>(scale), out<T>(x), q.numel() / width, width,
                              scope.stream);
    scope.check();
  });
  return x;
}

// The ops of one dispatch key, in the order of ops.cpp's schemas.
template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("quantise_tiles", TORCH_BOX(&quantise_tiles<Backend>));
  m.impl("dequantise_tiles", TORCH_BOX(&dequantise_tiles<Backend>));
}

}  // namespace kimi

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

#include <optional>
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

// Calls body(stream) on x's device, unless x is empty.
template <class Backend, class Body>
void launch(const Tensor& x, Body body) {
  if (x.numel() == 0) return;
  typename Backend::Scope scope(x.get_device_index());
  body(scope.stream);
  scope.check();
}

// ---- FP8 tiles ------------------------------------------------------------------------------

inline void check_tiles(const Tensor& q, const Tensor& scale) {
  check_dense(q, "q");
  check_dense(scale, "scale");
  KIMI_CHECK(q.scalar_type() == ScalarType::Float8_e4m3fn, "q must be float8_e4m3fn");
  KIMI_CHECK(scale.scalar_type() == ScalarType::Float, "scale must be float32");
  KIMI_CHECK(q.get_device_index() == scale.get_device_index(), "scale is on another device");
  KIMI_CHECK(shape_of(scale) == with_width(q, tiles_of(q.size(-1))),
             "scale must hold one number a tile of q");
}

// x [..., width] -> (q [..., width] E4M3, scale [..., ceil(width / 128)] fp32).
template <class Backend>
std::tuple<Tensor, Tensor> quantise_tiles(const Tensor& x) {
  check_dense(x, "x");
  const int64_t width = x.size(-1);
  Tensor q = empty(x, shape_of(x), ScalarType::Float8_e4m3fn);
  Tensor scale = empty(x, with_width(x, tiles_of(width)), ScalarType::Float);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(x, [&](void* stream) {
      Backend::quantise_tiles(in<T>(x), out<uint8_t>(q), out<float>(scale), x.numel() / width,
                              width, stream);
    });
  });
  return {q, scale};
}

// The way back, to bf16 or fp32.
template <class Backend>
Tensor dequantise_tiles(const Tensor& q, const Tensor& scale, ScalarType dtype) {
  check_tiles(q, scale);
  Tensor x = empty(q, shape_of(q), dtype);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    launch<Backend>(q, [&](void* stream) {
      const int64_t width = q.size(-1);
      Backend::dequantise_tiles(in<uint8_t>(q), in<float>(scale), out<T>(x), q.numel() / width,
                                width, stream);
    });
  });
  return x;
}

// ---- SwiGLU ---------------------------------------------------------------------------------

inline int64_t half_width(const Tensor& gate_up) {
  KIMI_CHECK(gate_up.size(-1) % 2 == 0, "gate and up must be of one width");
  return gate_up.size(-1) / 2;
}

inline void check_grad(const Tensor& grad, const std::vector<int64_t>& shape) {
  check_dense(grad, "grad");
  KIMI_CHECK(shape_of(grad) == shape, "grad must have the shape of the result");
}

// gate_up [..., 2 * width] -> [..., width].
template <class Backend>
Tensor swiglu(const Tensor& gate_up) {
  check_dense(gate_up, "gate_up");
  const int64_t width = half_width(gate_up);
  Tensor y = empty(gate_up, with_width(gate_up, width), gate_up.scalar_type());
  with_type(gate_up.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(y, [&](void* stream) {
      Backend::swiglu(in<T>(gate_up), out<T>(y), y.numel() / width, width, stream);
    });
  });
  return y;
}

template <class Backend>
Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up) {
  check_dense(gate_up, "gate_up");
  const int64_t width = half_width(gate_up);
  check_grad(grad, with_width(gate_up, width));
  check_like(grad, gate_up, "grad");
  Tensor grad_gate_up = empty(gate_up, shape_of(gate_up), gate_up.scalar_type());
  with_type(gate_up.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(grad, [&](void* stream) {
      Backend::swiglu_backward(in<T>(grad), in<T>(gate_up), out<T>(grad_gate_up),
                               grad.numel() / width, width, stream);
    });
  });
  return grad_gate_up;
}

// SwiGLU of stored tiles: q [..., 2 * width], scale [..., ceil(2 * width / 128)].
template <class Backend>
Tensor swiglu_tiles(const Tensor& q, const Tensor& scale, ScalarType dtype) {
  check_tiles(q, scale);
  const int64_t width = half_width(q);
  Tensor y = empty(q, with_width(q, width), dtype);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    launch<Backend>(y, [&](void* stream) {
      Backend::swiglu_tiles(in<uint8_t>(q), in<float>(scale), out<T>(y), y.numel() / width, width,
                            stream);
    });
  });
  return y;
}

template <class Backend>
Tensor swiglu_tiles_backward(const Tensor& grad, const Tensor& q, const Tensor& scale) {
  check_tiles(q, scale);
  const int64_t width = half_width(q);
  check_grad(grad, with_width(q, width));
  Tensor grad_gate_up = empty(grad, shape_of(q), grad.scalar_type());
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(grad, [&](void* stream) {
      Backend::swiglu_tiles_backward(in<T>(grad), in<uint8_t>(q), in<float>(scale),
                                     out<T>(grad_gate_up), grad.numel() / width, width, stream);
    });
  });
  return grad_gate_up;
}

// ---- RMSNorm --------------------------------------------------------------------------------

inline void check_norm(const Tensor& x, const Tensor& weight) {
  check_dense(x, "x");
  check_like(weight, x, "weight");
  KIMI_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), "weight must be of x's width");
}

// x [..., width], weight [width] -> (y [..., width], scale [..., 1] fp32 = 1 / sqrt(mean + eps)).
// x may be a view, as MLA's latent is: it is copied for as long as this lasts, and autograd keeps the
// view, whose storage others keep too.
template <class Backend>
std::tuple<Tensor, Tensor> rms_norm(const Tensor& view, const Tensor& weight, double eps) {
  const Tensor x = torch::stable::contiguous(view);
  check_norm(x, weight);
  Tensor y = empty(x, shape_of(x), x.scalar_type());
  Tensor scale = empty(x, with_width(x, 1), ScalarType::Float);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(x, [&](void* stream) {
      Backend::rms_norm(in<T>(x), in<T>(weight), float(eps), out<T>(y), out<float>(scale),
                        scale.numel(), x.size(-1), stream);
    });
  });
  return {y, scale};
}

// (grad of x, grad of weight in fp32).
template <class Backend>
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& view,
                                             const Tensor& weight, const Tensor& scale) {
  const Tensor x = torch::stable::contiguous(view);
  check_norm(x, weight);
  check_grad(grad, shape_of(x));
  check_like(grad, x, "grad");
  check_dense(scale, "scale");
  KIMI_CHECK(shape_of(scale) == with_width(x, 1) && scale.scalar_type() == ScalarType::Float,
             "scale must be what the forward gave");
  const int64_t rows = scale.numel(), width = x.size(-1);
  Tensor grad_x = empty(x, shape_of(x), x.scalar_type());
  Tensor grad_weight = torch::stable::new_zeros(x, {width}, ScalarType::Float);
  Tensor partial = empty(x, {Backend::strips(rows), width}, ScalarType::Float);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(x, [&](void* stream) {
      Backend::rms_norm_backward(in<T>(grad), in<T>(x), in<T>(weight), in<float>(scale),
                                 out<T>(grad_x), out<float>(partial), out<float>(grad_weight), rows,
                                 width, stream);
    });
  });
  return {grad_x, grad_weight};
}

// ---- permutation ----------------------------------------------------------------------------

// order [tokens * k] and inverse [tokens, k], int64 and each the other's inverse; gives k.
inline int64_t slots_of(const Tensor& order, const Tensor& inverse) {
  check_dense(order, "order");
  check_dense(inverse, "inverse");
  KIMI_CHECK(order.scalar_type() == ScalarType::Long && inverse.scalar_type() == ScalarType::Long,
             "order and inverse must be int64");
  KIMI_CHECK(order.dim() == 1 && inverse.dim() == 2 && order.numel() == inverse.numel(),
             "order must be [tokens * k] and inverse [tokens, k]");
  return inverse.size(1);
}

inline void check_rows(const Tensor& rows, int64_t count, const char* name) {
  check_dense(rows, name);
  KIMI_CHECK(rows.dim() == 2 && rows.size(0) == count, name, " has another number of rows");
}

inline void check_weights(const Tensor& weights, const Tensor& inverse) {
  check_dense(weights, "weights");
  KIMI_CHECK(weights.scalar_type() == ScalarType::Float, "weights must be float32");
  KIMI_CHECK(shape_of(weights) == shape_of(inverse), "weights must be [tokens, k]");
}

// x [tokens, width] -> [tokens * k, width]: row r is the token of slot order[r].
template <class Backend>
Tensor take_rows(const Tensor& x, const Tensor& order, const Tensor& inverse) {
  const int64_t slots = slots_of(order, inverse), tokens = inverse.size(0);
  check_rows(x, tokens, "x");
  Tensor rows = empty(x, {tokens * slots, x.size(1)}, x.scalar_type());
  Backend::check_index(order, tokens * slots);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(rows, [&](void* stream) {
      Backend::take_rows(in<T>(x), in<int64_t>(order), out<T>(rows), tokens, slots, x.size(1),
                         stream);
    });
  });
  return rows;
}

template <class Backend>
Tensor sum_slots(const Tensor& rows, const Tensor* weights, const Tensor& order,
                 const Tensor& inverse) {
  const int64_t slots = slots_of(order, inverse), tokens = inverse.size(0);
  check_rows(rows, tokens * slots, "rows");
  Tensor y = empty(rows, {tokens, rows.size(1)}, rows.scalar_type());
  Backend::check_index(inverse, tokens * slots);
  with_type(rows.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(y, [&](void* stream) {
      Backend::weighted_rows(in<T>(rows), weights ? in<float>(*weights) : nullptr,
                             in<int64_t>(inverse), out<T>(y), tokens, slots, rows.size(1), stream);
    });
  });
  return y;
}

// rows [tokens * k, width] -> [tokens, width].
template <class Backend>
Tensor summed_rows(const Tensor& rows, const Tensor& order, const Tensor& inverse) {
  return sum_slots<Backend>(rows, nullptr, order, inverse);
}

template <class Backend>
Tensor weighted_rows(const Tensor& rows, const Tensor& weights, const Tensor& order,
                     const Tensor& inverse) {
  check_weights(weights, inverse);
  return sum_slots<Backend>(rows, &weights, order, inverse);
}

// (grad of rows, grad of weights).
template <class Backend>
std::tuple<Tensor, Tensor> weighted_rows_backward(const Tensor& grad, const Tensor& rows,
                                                  const Tensor& weights, const Tensor& order,
                                                  const Tensor& inverse) {
  const int64_t slots = slots_of(order, inverse), tokens = inverse.size(0);
  check_rows(rows, tokens * slots, "rows");
  check_weights(weights, inverse);
  check_grad(grad, {tokens, rows.size(1)});
  check_like(grad, rows, "grad");
  Tensor grad_rows = empty(rows, shape_of(rows), rows.scalar_type());
  Tensor grad_weights = empty(weights, shape_of(weights), ScalarType::Float);
  Backend::check_index(order, tokens * slots);
  with_type(rows.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(rows, [&](void* stream) {
      Backend::weighted_rows_backward(in<T>(grad), in<T>(rows), in<float>(weights),
                                      in<int64_t>(order), out<T>(grad_rows),
                                      out<float>(grad_weights), tokens, slots, rows.size(1),
                                      stream);
    });
  });
  return {grad_rows, grad_weights};
}

// ---- QK-Clip ----------------------------------------------------------------------------------

// q, k [sequences, heads, length, width], documents [sequences, length] int64 or none, chosen
// [heads] bool -> [heads] fp32.
template <class Backend>
Tensor max_logits(const Tensor& q, const Tensor& k, double scale,
                  const std::optional<Tensor>& documents, const Tensor& chosen) {
  check_dense(q, "q");
  check_like(k, q, "k");
  KIMI_CHECK(q.dim() == 4 && shape_of(q) == shape_of(k) && q.numel() > 0,
             "q and k must be [sequences, heads, length, width], and not empty");
  const int64_t sequences = q.size(0), heads = q.size(1), length = q.size(2);
  KIMI_CHECK(sequences * heads <= 65535, "at most 65535 heads of sequences at once");
  check_dense(chosen, "chosen");
  KIMI_CHECK(chosen.scalar_type() == ScalarType::Bool && shape_of(chosen) == std::vector{heads},
             "chosen must be one bool a head");
  if (documents) {
    check_dense(*documents, "document_ids");
    KIMI_CHECK(documents->scalar_type() == ScalarType::Long &&
                   shape_of(*documents) == (std::vector{sequences, length}),
               "document_ids must be int64 [sequences, length]");
  }
  Tensor largest = empty(q, {heads}, ScalarType::Float);
  Tensor partial = empty(q, {sequences, heads, Backend::logit_blocks(length)}, ScalarType::Float);
  with_type(q.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch<Backend>(q, [&](void* stream) {
      Backend::max_logits(in<T>(q), in<T>(k), documents ? in<int64_t>(*documents) : nullptr,
                          in<bool>(chosen), float(scale), out<float>(partial), out<float>(largest),
                          sequences, heads, length, q.size(3), stream);
    });
  });
  return largest;
}

// The ops of one dispatch key; their schemas are in cpu/ops.cpp.
template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("quantise_tiles", TORCH_BOX(&quantise_tiles<Backend>));
  m.impl("dequantise_tiles", TORCH_BOX(&dequantise_tiles<Backend>));
  m.impl("swiglu", TORCH_BOX(&swiglu<Backend>));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward<Backend>));
  m.impl("swiglu_tiles", TORCH_BOX(&swiglu_tiles<Backend>));
  m.impl("swiglu_tiles_backward", TORCH_BOX(&swiglu_tiles_backward<Backend>));
  m.impl("rms_norm", TORCH_BOX(&rms_norm<Backend>));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward<Backend>));
  m.impl("take_rows", TORCH_BOX(&take_rows<Backend>));
  m.impl("summed_rows", TORCH_BOX(&summed_rows<Backend>));
  m.impl("weighted_rows", TORCH_BOX(&weighted_rows<Backend>));
  m.impl("weighted_rows_backward", TORCH_BOX(&weighted_rows_backward<Backend>));
  m.impl("max_logits", TORCH_BOX(&max_logits<Backend>));
}

}  // namespace kimi

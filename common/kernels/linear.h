// A matrix in panels of 16 outputs, of floats, eight or four bits, and rows of activations in the form of its product.
//
// In a panel the weights of one input for 16 outputs are side by side, so that no sum adds numbers within a register.
//
//   kind      weight                           scale             product
//   floats    (panels, K, 16) float32                            x . w
//   bfloats   (panels, K / 2, 16, 2) bfloat16                    x . w: sums in float32. x is rounded to bfloat16 where the
//                                                                processor has a product of two bfloat16 (HAS_BFLOATS)
//   int8      (panels, K / 2, 16, 2) int8      (panels, 16)      (x . w) * scale
//   w8a8      (panels, K / 2, 16, 2) int8      (panels, 16)      (q . w) * x_scale * scale: q whole numbers, sums exact
//    both, with HAS_QUADS, (panels, K / 4, 16, 4) uint8: w + 128; and x of int8 becomes whole numbers of sixteen bits, of
//    which the high and the low eight are multiplied each for itself
//   int4      (panels, groups,                 (panels, groups, 16) float16, and as many minima: x . (w * scale + minimum)
//              group / 8, 16, 4) uint8
//   w4a8      as int4                          as int4           (q . (w * scale + minimum)) * x_scale: sums of q . w exact
//
// The last two axes are PANEL outputs and the neighbours of one: two inputs, or four bytes of eight inputs, of which the
// first four are in the low halves. K / 2, K / 4 and group / 8 are rounded up, and N to whole panels: what was added is 0.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "vectors.h"

namespace inference_course {

constexpr int64_t PANEL = 16;

enum Kind : int64_t { FLOATS, INT8, W8A8, INT4, BFLOATS, W4A8 };

struct Linear : torch::CustomClassHolder {
  Kind kind;
  int64_t N, K, group_size, num_groups = 0;
  at::Tensor weight, scale, minimum;  // undefined where the kind has none
  // Pointers to the weights, and to scales and minima of groups. Asking torch for them takes as long as a small group.
  mutable const uint8_t* packed;
  mutable const at::Half *group_scales = nullptr, *group_minima = nullptr;

  Linear(int64_t kind, int64_t N, int64_t K, at::Tensor weight, std::optional<at::Tensor> scale,
         std::optional<at::Tensor> minimum, int64_t group_size)
      : kind(Kind(kind)), N(N), K(K), group_size(group_size), weight(std::move(weight)),
        scale(scale.value_or(at::Tensor())), minimum(minimum.value_or(at::Tensor())) {
    if (kind == INT4 || kind == W4A8) num_groups = this->scale.size(1);
    locate();
  }

  // Called before each product, since the tensors may have moved since the last one (huge_pages.py).
  void locate() const {
    packed = static_cast<const uint8_t*>(weight.const_data_ptr());
    if (num_groups != 0) group_scales = scale.const_data_ptr<at::Half>();
    if (minimum.defined()) group_minima = minimum.const_data_ptr<at::Half>();
  }

  int64_t panels() const { return (N + PANEL - 1) / PANEL; }
  bool has_quads() const { return (kind == W8A8 || kind == INT8) && HAS_QUADS; }
  int64_t neighbours() const { return has_quads() ? 4 : 2; }
  int64_t planes() const { return kind == INT8 && has_quads() ? 2 : 1; }  // numbers of eight bits for each number of x
  int64_t words() const { return (K + neighbours() - 1) / neighbours(); }  // of a row, in kinds without groups
  int64_t octs() const { return (group_size + 7) / 8; }  // of a group
};

// Rows in the form of a product: floats (count, stride), or numbers of fewer bits, a row in `stride` bytes, with a scale
// for each row if they are whole. Also, for a matrix in four bits, the sums of each group, (count, groups), and for quads
// the sum of each row, (count, planes).
struct Rows {
  const float* floats;
  const void* numbers;
  const float *scales, *sums;
  int64_t count, stride;
};

// The scale of numbers in eight bits whose largest magnitude is `most`; NaN for NaN.
inline float scale_of(float most) { return (most / 127 > 0 ? most / 127 : 1) + most * 0; }

// The scale of a row in eight bits, as in lesson 7's quantize_int8. It is NaN for a row with a NaN, which must not become
// a number.
inline float scale_of(const float* x, int64_t K) {
  vec wide = {}, zeros = {};
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    const vec v = load<vec>(x + k), size = v < 0 ? -v : v;
    wide = size > wide ? size : wide;
    zeros += v * 0;
  }
  float most = 0, zero = 0;
  for (int i = 0; i < LANES; ++i) most = std::max(most, wide[i]), zero += zeros[i];
  for (; k < K; ++k) most = std::max(most, std::fabs(x[k])), zero += x[k] * 0;
  return scale_of(most) + zero;
}

// The nearest whole number, from -most to most.
inline float nearest(float x, float most) { return std::min(most, std::max(-most, (x + 12582912.0f) - 12582912.0f)); }

// `count` numbers of a row in sixteen bits, from -32512 to 32512, each as 256 * high + low.
inline void quantize(const float* x, int64_t count, float scale, int8_t* high, int8_t* low) {
  for (int64_t k = 0; k < count; ++k) {
    const int32_t whole = static_cast<int32_t>(nearest(x[k] / scale, 32512));
    high[k] = static_cast<int8_t>((whole + 128) >> 8), low[k] = static_cast<int8_t>(whole);
  }
}

// `count` numbers of a row in eight bits, from -127 to 127.
template <typename Number>
inline void quantize(const float* x, int64_t count, float scale, Number* numbers) {
  for (int64_t k = 0; k < count; ++k) numbers[k] = static_cast<Number>(nearest(x[k] / scale, 127));
}

// Rows of a product, and what `prepare` computes from each of them for some kinds of matrix.
struct Input {
  const Linear& layer;
  int64_t count, stride, num_sums;
  std::vector<uint8_t> numbers;  // the floats, rounded to whole numbers or bfloat16
  std::vector<float> scales, sums;

  Input(const Linear& layer, int64_t count) : layer(layer), count(count), stride(layer.K), num_sums(layer.num_groups) {
    layer.locate();
    if (layer.kind == W8A8 || layer.has_quads() || is_rounded()) {
      stride = 4 * layer.words() * layer.planes(), numbers.resize(count * stride);
    }
    if (layer.kind == W4A8) stride = layer.num_groups * 8 * layer.octs(), numbers.resize(count * stride);
    if (layer.has_quads()) num_sums = layer.planes();
    if (is_quantized()) scales.resize(count);
    sums.resize(count * num_sums);
  }
  bool is_quantized() const { return layer.kind == W8A8 || layer.kind == W4A8 || layer.has_quads(); }
  bool is_rounded() const { return layer.kind == BFLOATS && HAS_BFLOATS; }
  bool needs_preparation() const { return is_quantized() || is_rounded() || layer.kind == INT4; }

  // most: the largest magnitudes of the whole rows, if x is a rank's part of them, or nullptr.
  void prepare(const float* x, int64_t row, const float* most = nullptr) {
    uint8_t* to = numbers.data() + row * stride;
    if (is_quantized()) scales[row] = most ? scale_of(most[row]) : scale_of(x, layer.K);
    if (is_rounded()) round_to(reinterpret_cast<uint16_t*>(to), x, layer.K);
    if (layer.kind == W8A8 && !HAS_QUADS) quantize(x, layer.K, scales[row], reinterpret_cast<int16_t*>(to));
    if (layer.planes() == 2) return prepare_planes(x, row, reinterpret_cast<int8_t*>(to));
    const int64_t size = layer.num_groups ? layer.group_size : layer.K;
    for (int64_t group = 0, k = 0; group < num_sums; ++group, k += size) {
      const int64_t count = std::min(size, layer.K - k);
      float& all = sums[row * num_sums + group];
      if (layer.kind == INT4) {
        all = sum(x + k, count);
      } else {
        int8_t* bytes = reinterpret_cast<int8_t*>(to) + group * 8 * layer.octs();
        quantize(x + k, count, scales[row], bytes);
        all = total(bytes, count);
      }
    }
  }
  void prepare_planes(const float* x, int64_t row, int8_t* to) {
    scales[row] /= 256;
    quantize(x, layer.K, scales[row], to, to + stride / 2);
    for (int i = 0; i < 2; ++i) sums[2 * row + i] = total(to + i * stride / 2, layer.K);
  }
  static int32_t total(const int8_t* numbers, int64_t count) {
    int32_t all = 0;
    for (int64_t i = 0; i < count; ++i) all += numbers[i];
    return all;
  }
  Rows rows(const float* x) const {
    return {numbers.empty() ? x : nullptr, numbers.data(), scales.data(), sums.data(), count, stride};
  }
};

}  // namespace inference_course

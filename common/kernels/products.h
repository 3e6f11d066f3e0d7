// Products of rows of activations with a matrix in panels of 16 outputs, in floats, eight bits or four.
//
// Decoding reads each weight once for a few rows, so what counts is the bytes that are read. With many rows arithmetic
// counts: a panel of few bits becomes floats once, in the cache, for all rows of a chunk. In a panel the outputs of one
// input lie side by side, so that a sum needs no addition across a register.
//
//   kind      weight                       scale             product
//   floats    (panels, K, 16) float32                        x . w
//   int8      (panels, K / 2, 16, 2) int8  (panels, 16)      (x . w) * scale
//   w8a8      (panels, K / 2, 16, 2) int8  (panels, 16)      (q . w) * x_scale * scale: q whole numbers, sums exact
//   int4      (panels, groups,             (panels, groups, 16) float16, and as many minima: x . (w * scale + minimum)
//              group / 4, 16, 2) uint8
//
// The last two axes are PANEL outputs and the neighbours of one: two bytes of one input each, or of two, the first in the
// low half. K / 2 and group / 4 are rounded up, and N to whole panels: what was added is 0.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace inference_course {

constexpr int64_t PANEL = 16;
constexpr int64_t SLICE = 256;        // inputs of a panel, as floats, that stay in the first cache for many rows
constexpr int64_t CHUNK = 96;         // the most rows whose sums are kept
constexpr int64_t FEW_ROWS = 4;       // up to here INT8 and INT4 are unpacked in registers
constexpr int64_t CACHED = 64 << 10;  // floats of x that stay in the second cache while the panels pass

enum Kind : int64_t { FLOATS, INT8, W8A8, INT4 };

struct Linear : torch::CustomClassHolder {
  Kind kind;
  int64_t N, K, group_size;
  at::Tensor weight, scale, minimum;  // undefined where the kind has none

  Linear(int64_t kind, int64_t N, int64_t K, at::Tensor weight, std::optional<at::Tensor> scale,
         std::optional<at::Tensor> minimum, int64_t group_size)
      : kind(Kind(kind)), N(N), K(K), group_size(group_size), weight(std::move(weight)),
        scale(scale.value_or(at::Tensor())), minimum(minimum.value_or(at::Tensor())) {}

  int64_t panels() const { return (N + PANEL - 1) / PANEL; }
  int64_t pairs() const { return (K + 1) / 2; }
  int64_t quads() const { return (group_size + 3) / 4; }  // of a group
};

// Rows as a product wants them: floats, or whole numbers with a scale for each row. (R, stride), stride >= K.
struct Rows {
  const float* floats;
  const int16_t* numbers;
  const float* scales;
  int64_t count, stride;
};

// What W8A8 needs of a row beside its floats: K rounded up to a pair. From -127 to 127, as lesson 7's quantize_int8. As
// there, a row with a NaN has a scale that is NaN: it must not become a number.
inline void quantize_row(const float* x, int64_t K, int16_t* numbers, float* scale) {
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
  *scale = (most / 127 > 0 ? most / 127 : 1) + zero;
  for (k = 0; k < K; ++k) {
    const float nearest = (x[k] / *scale + 12582912.0f) - 12582912.0f;
    numbers[k] = static_cast<int16_t>(std::min(127.0f, std::max(-127.0f, nearest)));
  }
  if (K % 2) numbers[K] = 0;
}

// R rows times `count` inputs of a panel, (count, 16) floats; sums: (R, 16), added to.
template <int R>
inline void times_floats(const float* x, int64_t stride, const float* panel, int64_t count, float* sums) {
  constexpr int PARTS = PANEL / LANES;
  vec s[R][PARTS], w[PARTS];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) s[r][i] = load<vec>(sums + r * PANEL + i * LANES);
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    for (int i = 0; i < PARTS; ++i) keep(w[i] = load<vec>(panel + k * PANEL + i * LANES));
    for (int r = 0; r < R; ++r) {
      vec number = x[r * stride + k] - vec{};
      keep(number);
      for (int i = 0; i < PARTS; ++i) s[r][i] += number * w[i];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) store(sums + r * PANEL + i * LANES, s[r][i]);
}

// R rows of whole numbers times a panel of pairs, (pairs, 16, 2); sums: (R, 16).
template <int R>
inline void times_numbers(const int16_t* x, int64_t stride, const uint8_t* panel, int64_t pairs, int32_t* sums) {
  constexpr int PARTS = PANEL / LANES;
  ivec s[R][PARTS] = {};
  hvec w[PARTS];
#pragma GCC unroll 4
  for (int64_t k = 0; k < pairs; ++k) {
    for (int i = 0; i < PARTS; ++i)
      keep(w[i] = widen(load<bvec>(panel + 2 * (k * PANEL + i * LANES))));
    for (int r = 0; r < R; ++r) {
      ivec pair = load<int32_t>(x + r * stride + 2 * k) - ivec{};
      keep(pair);
      for (int i = 0; i < PARTS; ++i) s[r][i] = add_pairs(s[r][i], (hvec)pair, w[i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) store(sums + r * PANEL + i * LANES, s[r][i]);
}

// What 2 * LANES bytes hold, in floats: two inputs of LANES outputs in eight bits, or four inputs in four bits.
struct Pair {
  static constexpr int INPUTS = 2;
  vec w[2];
  explicit Pair(const void* from) {
    const ivec both = (ivec)widen(load<bvec>(from));
    w[0] = __builtin_convertvector((both << 16) >> 16, vec), w[1] = __builtin_convertvector(both >> 16, vec);
  }
};

struct Quad {
  static constexpr int INPUTS = 4;
  vec w[4];
  explicit Quad(const void* from) {
    const ivec all = (ivec)widen(load<ubvec>(from));
    w[0] = __builtin_convertvector(all & 15, vec), w[1] = __builtin_convertvector((all >> 4) & 15, vec);
    w[2] = __builtin_convertvector((all >> 16) & 15, vec), w[3] = __builtin_convertvector(all >> 20, vec);
  }
};

// As times_floats, for numbers of few bits, which become floats in registers: once for all R rows.
template <int R, typename Packed>
inline void times_packed(const float* x, int64_t stride, const uint8_t* panel, int64_t count, float* sums) {
  constexpr int PARTS = PANEL / LANES, INPUTS = Packed::INPUTS;
  vec s[R][PARTS];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) s[r][i] = load<vec>(sums + r * PANEL + i * LANES);
  const auto step = [&](const float* in, int64_t apart, int inputs) {
    for (int i = 0; i < PARTS; ++i, panel += 2 * LANES) {
      const Packed unpacked(panel);
      for (int j = 0; j < inputs; ++j)
        for (int r = 0; r < R; ++r) s[r][i] += in[r * apart + j] * unpacked.w[j];
    }
  };
  int64_t k = 0;
  for (; k + INPUTS <= count; k += INPUTS) step(x + k, stride, INPUTS);
  for (int left = count - k; left > 0; left = 0) step(x + k, stride, left);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) store(sums + r * PANEL + i * LANES, s[r][i]);
}

// One group of a panel of INT4: its numbers, its scales, and what the number 0 stands for.
struct Group {
  const uint8_t* numbers;
  float scale[PANEL], base[PANEL];

  Group(const Linear& w, int64_t panel, int64_t group) {
    const int64_t index = panel * w.scale.size(1) + group, at = index * PANEL;
    numbers = w.weight.const_data_ptr<uint8_t>() + at * 2 * w.quads();
    const at::Half *s = w.scale.const_data_ptr<at::Half>() + at;
    const at::Half *m = w.minimum.defined() ? w.minimum.const_data_ptr<at::Half>() + at : nullptr;
    for (int i = 0; i < PANEL; ++i) scale[i] = s[i], base[i] = m ? static_cast<float>(m[i]) : -8 * scale[i];
  }
};

// R rows times a panel of INT4: of each group the sums of x . number and of x alone are taken first, and scaled then.
template <int R>
inline void times_groups(const Linear& w, const float* x, int64_t stride, int64_t panel, float* sums) {
  for (int64_t first = 0, group = 0; first < w.K; first += w.group_size, ++group) {
    const int64_t count = std::min(w.group_size, w.K - first);
    const Group of(w, panel, group);
    float parts[R * PANEL] = {};
    times_packed<R, Quad>(x + first, stride, of.numbers, count, parts);
    for (int r = 0; r < R; ++r) {
      const float all = sum(x + r * stride + first, count);
      for (int i = 0; i < PANEL; ++i) sums[r * PANEL + i] += parts[r * PANEL + i] * of.scale[i] + all * of.base[i];
    }
  }
}

// call.operator()<R>() for the R that is `rows`, 1 to TILE.
template <int R = TILE, typename Call>
inline void with_rows(int64_t rows, Call call) {
  if constexpr (R > 0) {
    if (rows == R) call(std::integral_constant<int, R>());
    else with_rows<R - 1>(rows, call);
  }
}

// Inputs `first` to `last` of a panel as floats, (last - first, 16). INT8's scale is left for the sums. `first` is even,
// and the first input of a group.
inline void unpack(const Linear& w, int64_t panel, int64_t first, int64_t last, float* out) {
  if (w.kind == INT8) {
    const int8_t* from = w.weight.const_data_ptr<int8_t>() + (panel * w.pairs() + first / 2) * 2 * PANEL;
    for (int64_t k = first; k < last; k += 2, from += 2 * PANEL, out += 2 * PANEL)
      for (int i = 0; i < PANEL; i += LANES) {
        const Pair numbers(from + 2 * i);
        store(out + i, numbers.w[0]), store(out + PANEL + i, numbers.w[1]);
      }
    return;
  }
  for (int64_t k = first; k < last; k += w.group_size) {
    const Group of(w, panel, k / w.group_size);
    const int64_t count = std::min(w.group_size, last - k);
    const uint8_t* from = of.numbers;
    for (int64_t j = 0; j < count; j += 4)
      for (int i = 0; i < PANEL; i += LANES, from += 2 * LANES) {
        const Quad numbers(from);
        const vec scale = load<vec>(of.scale + i), base = load<vec>(of.base + i);
        for (int64_t l = 0; l < std::min<int64_t>(4, count - j); ++l)
          store(out + (j + l) * PANEL + i, base + scale * numbers.w[l]);
      }
    out += count * PANEL;
  }
}

// A thread's floats for an unpacked slice, kept from call to call.
struct Scratch {
  float* floats = nullptr;
  explicit Scratch(int64_t size) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
    floats = kept.data();
  }
};

// The sums of `rows` <= CHUNK rows from `first` on with one panel, scale and bias applied. bias: (N), or nullptr.
// sums: (rows, 16). A slice of the panel stays in the first cache for all rows.
inline void times_panel(const Linear& w, const float* bias, const Rows& x, int64_t first, int64_t rows, int64_t panel,
                        float* sums) {
  const uint8_t* packed = static_cast<const uint8_t*>(w.weight.const_data_ptr());
  const float* in = x.floats + first * x.stride;
  const auto tiles = [&](auto compute) {  // compute.operator()<R>(row) for each tile of R rows
    for (int64_t r = 0; r < rows; r += TILE)
      with_rows(std::min<int64_t>(TILE, rows - r), [&](auto R) { compute(R, r); });
  };
  const float* scale = w.kind == INT8 || w.kind == W8A8 ? w.scale.const_data_ptr<float>() + panel * PANEL : nullptr;
  if (w.kind == W8A8) {
    const int16_t* numbers = x.numbers + first * x.stride;
    tiles([&](auto R, int64_t r) {
      int32_t exact[R() * PANEL];
      times_numbers<R()>(numbers + r * x.stride, x.stride, packed + panel * w.pairs() * 2 * PANEL, w.pairs(), exact);
      for (int j = 0; j < R(); ++j)
        for (int i = 0; i < PANEL; ++i)
          sums[(r + j) * PANEL + i] = static_cast<float>(exact[j * PANEL + i]) * x.scales[first + r + j] * scale[i];
    });
    scale = nullptr;
  } else {
    std::fill(sums, sums + rows * PANEL, 0.0f);
    if (w.kind != FLOATS && rows <= FEW_ROWS) {
      with_rows<FEW_ROWS>(rows, [&](auto R) {
        if (w.kind == INT4) return times_groups<R()>(w, in, x.stride, panel, sums);
        times_packed<R(), Pair>(in, x.stride, packed + panel * w.pairs() * 2 * PANEL, w.K, sums);
      });
    } else {
      const int64_t unit = w.kind == INT4 ? w.group_size : 2, step = (SLICE + unit - 1) / unit * unit;
      const Scratch scratch(w.kind == FLOATS ? 0 : std::min(step, w.K + 1) * PANEL);
      for (int64_t k = 0; k < w.K; k += step) {
        const int64_t end = std::min(k + step, w.K);
        const float* slice = scratch.floats;
        if (w.kind == FLOATS) slice = w.weight.const_data_ptr<float>() + (panel * w.K + k) * PANEL;
        else unpack(w, panel, k, end, scratch.floats);
        tiles([&](auto R, int64_t r) {
          times_floats<R()>(in + r * x.stride + k, x.stride, slice, end - k, sums + r * PANEL);
        });
      }
    }
  }
  const int64_t outputs = std::min(PANEL, w.N - panel * PANEL);
  for (int64_t r = 0; r < rows; ++r, sums += PANEL) {
    for (int i = 0; scale && i < PANEL; ++i) sums[i] *= scale[i];
    for (int64_t i = 0; bias && i < outputs; ++i) sums[i] += bias[panel * PANEL + i];
  }
}

// All rows times some panels, and with COUNT = 2 the panels that lie `apart` after them, too.
// done(panel, first row, rows, sums): sums (rows, 16), of the second panel CHUNK * 16 further.
template <int COUNT, typename Done>
inline void product(const Linear& w, const float* bias, const Rows& x, int64_t begin, int64_t end, int64_t apart,
                    Done done) {
  const int64_t chunk = std::clamp<int64_t>(CACHED / w.K / TILE * TILE, 2 * TILE, CHUNK);
  float sums[COUNT * CHUNK * PANEL];
  for (int64_t first = 0; first < x.count; first += chunk)
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t rows = std::min(chunk, x.count - first);
      for (int i = 0; i < COUNT; ++i)
        times_panel(w, bias, x, first, rows, panel + i * apart, sums + i * CHUNK * PANEL);
      done(panel, first, rows, sums);
    }
}

}  // namespace inference_course

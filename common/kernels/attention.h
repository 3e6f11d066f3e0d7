// Attention over block tables: keys and values are read in their blocks, of any size, and are not gathered first.
//
// The work is divided into items: a request, a key/value head, and up to QUERIES of the request's new tokens. An item
// folds the heads of a group (lesson 3's `fold_groups`), so that it reads a key once for all of them, and goes through
// the keys in steps of KEYS with an online softmax (lesson 4's `merge_partials`).
#pragma once

#include <cmath>
#include <limits>

#include "products.h"

namespace inference_course {

constexpr int64_t KEYS = 16, QUERIES = 32;
constexpr int FOLDED = LANES == 16 ? 4 : 2;  // heads for which a key is read once: four keys' sums fit into the registers
constexpr int64_t MANY_KEYS = 64;  // keys in a step of attend_many

// One layer's blocks: (num_blocks, block_size, kv_heads, head_dim) each. Number: float, or uint16_t for a bfloat16.
template <typename Number>
struct Blocks {
  static constexpr int64_t LINE = 64 / sizeof(Number);  // numbers in a line of the cache
  Number *keys, *values;
  int64_t block_size, kv_heads, head_dim;

  // Finds one head's keys and values of `count` positions from `first` on, and prefetches them.
  void find(const int64_t* table, int64_t first, int64_t count, int64_t kv_head, const Number** found_keys,
            const Number** found_values) const {
    int64_t block = first / block_size, offset = first % block_size;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = ((table[block] * block_size + offset) * kv_heads + kv_head) * head_dim;
      found_keys[j] = keys + at, found_values[j] = values + at;
      if (++offset == block_size) ++block, offset = 0;
      for (int64_t d = 0; d < head_dim; d += LINE) fetch(found_keys[j] + d), fetch(found_values[j] + d);
    }
  }
};

// Scores of HEADS queries, D floats each, and KEYS keys, times `scale`: (HEADS, KEYS).
template <int HEADS, typename Number>
inline void score(const float* q, const Number* const* keys, int64_t D, float scale, float* out) {
  vec sums[HEADS][LANES];
  for (int64_t first = 0; first < KEYS; first += LANES) {
    for (int j = 0; j < LANES; j += 4) {
      vec some[HEADS][4] = {};
      int64_t d = 0;
      for (; d + LANES <= D; d += LANES)
        for (int i = 0; i < 4; ++i) {
          const vec key = load_floats(keys[first + j + i] + d);
          for (int h = 0; h < HEADS; ++h) some[h][i] += load<vec>(q + h * D + d) * key;
        }
      for (; d < D; ++d)
        for (int i = 0; i < 4; ++i)
          for (int h = 0; h < HEADS; ++h) some[h][i][0] += q[h * D + d] * to_float(keys[first + j + i][d]);
      for (int h = 0; h < HEADS; ++h)
        for (int i = 0; i < 4; ++i) sums[h][j + i] = some[h][i];
    }
    for (int h = 0; h < HEADS; ++h) store(out + h * KEYS + first, totals(sums[h]) * scale);
  }
}

// out (HEADS, D) = out * keep + sum of weights[j] * values[j], for `count` values. weights: (HEADS, KEYS).
template <int HEADS, typename Number>
inline void mix(const float* weights, const Number* const* values, int64_t count, int64_t D, const float* keep, float* out) {
  const auto parts = [&](auto PARTS, int64_t d) {
    vec sums[HEADS][PARTS()];
    for (int h = 0; h < HEADS; ++h)
      for (int i = 0; i < PARTS(); ++i) sums[h][i] = load<vec>(out + h * D + d + i * LANES) * keep[h];
    for (int64_t j = 0; j < count; ++j)
      for (int i = 0; i < PARTS(); ++i) {
        const vec value = load_floats(values[j] + d + i * LANES);
        for (int h = 0; h < HEADS; ++h) sums[h][i] += weights[h * KEYS + j] * value;
      }
    for (int h = 0; h < HEADS; ++h)
      for (int i = 0; i < PARTS(); ++i) store(out + h * D + d + i * LANES, sums[h][i]);
  };
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) parts(std::integral_constant<int, 4>(), d);
  for (; d + LANES <= D; d += LANES) parts(std::integral_constant<int, 1>(), d);
  for (; d < D; ++d)
    for (int h = 0; h < HEADS; ++h) {
      out[h * D + d] *= keep[h];
      for (int64_t j = 0; j < count; ++j) out[h * D + d] += weights[h * KEYS + j] * to_float(values[j][d]);
    }
}

// Turns COUNT scores into weights, exp(score - highest), and returns their total. most: the highest score so far. keep: what
// the weights of earlier scores must be multiplied by.
template <int64_t COUNT>
inline float weigh(float* scores, float& most, float& keep) {
  vec top = load<vec>(scores), part = {};
  for (int64_t j = LANES; j < COUNT; j += LANES) top = load<vec>(scores + j) > top ? load<vec>(scores + j) : top;
  const float highest = std::max(most, largest(top));
  for (int64_t j = 0; j < COUNT; j += LANES) {
    const vec weight = exponential(load<vec>(scores + j) - highest);
    store(scores + j, weight);
    part += weight;
  }
  keep = highest > most ? std::exp(most - highest) : 1;
  most = highest;
  return total(part);
}

// Copies rows of D floats into panels: (count, D) -> (D / 16, MANY_KEYS, 16), padded with 0.
template <typename Number>
inline void in_panels(const Number* const* rows, int64_t count, int64_t D, float* panels) {
  for (int64_t first = 0; first < D; first += PANEL)
    for (int64_t j = 0; j < MANY_KEYS; ++j, panels += PANEL) {
      int64_t d = 0;
      if (j < count) {
        for (; d + LANES <= std::min(PANEL, D - first); d += LANES) store(panels + d, load_floats(rows[j] + first + d));
        for (; d < std::min(PANEL, D - first); ++d) panels[d] = to_float(rows[j][first + d]);
      }
      for (; d < PANEL; ++d) panels[d] = 0;
    }
}

// Copies panels of 16 numbers into panels of 16 rows: (size / 16, MANY_KEYS, 16) -> (MANY_KEYS / 16, size, 16).
inline void transpose(const float* panels, int64_t size, float* out) {
  for (int64_t d = 0; d < size; d += 4)
    for (int64_t j = 0; j < MANY_KEYS; j += 4) {
      const float* from = panels + (d / PANEL * MANY_KEYS + j) * PANEL + d % PANEL;
      const quad a = load<quad>(from), b = load<quad>(from + PANEL);
      const quad c = load<quad>(from + 2 * PANEL), e = load<quad>(from + 3 * PANEL);
      const quad low = pick<0, 4, 1, 5>(a, b), more = pick<0, 4, 1, 5>(c, e);
      const quad high = pick<2, 6, 3, 7>(a, b), most = pick<2, 6, 3, 7>(c, e);
      float* to = out + (j / PANEL * size + d) * PANEL + j % PANEL;
      store(to, pick<0, 1, 4, 5>(low, more)), store(to + PANEL, pick<2, 3, 6, 7>(low, more));
      store(to + 2 * PANEL, pick<0, 1, 4, 5>(high, most)), store(to + 3 * PANEL, pick<2, 3, 6, 7>(high, most));
    }
}

// Like `attend`, for many queries: both products are products of matrices, so that a key or value in a register serves
// TILE queries. Arrays: queries (heads, D), scores and weights (heads, MANY_KEYS), sums (D / 16, heads, 16).
template <typename Number>
inline void attend_many(const float* q, int64_t stride, int64_t tokens, int64_t group, int64_t position, int64_t window,
                        const Blocks<Number>& blocks, const int64_t* table, int64_t kv_head, float* out,
                        int64_t out_stride) {
  const int64_t D = blocks.head_dim, heads = tokens * group, size = (D + PANEL - 1) / PANEL * PANEL;
  const float scale = 1 / std::sqrt(static_cast<float>(D)), none = -std::numeric_limits<float>::infinity();
  const Scratch scratch(heads * (2 * size + 2 * MANY_KEYS + 2) + 2 * MANY_KEYS * size);
  float *panels = scratch.floats, *transposed = panels + MANY_KEYS * size, *queries = transposed + MANY_KEYS * size;
  float *sums = queries + heads * D, *products = sums + heads * size, *weights = products + heads * MANY_KEYS;
  float *maximum = weights + heads * MANY_KEYS, *total_weight = maximum + heads;
  std::fill_n(sums, heads * size, 0.0f), std::fill_n(maximum, heads, none), std::fill_n(total_weight, heads, 0.0f);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < D; ++d) queries[h * D + d] = scale * q[h / group * stride + h % group * D + d];
  // x: (heads, stride), its first `count` columns; panel: (panels, length, 16). Adds to sums, (panels, heads, 16).
  const auto multiply = [heads](const float* x, int64_t stride, int64_t count, const float* panel, int64_t num_panels,
                                int64_t length, float* sums) {
    for (int64_t h = 0; h < heads; h += TILE)
      with_rows(std::min<int64_t>(TILE, heads - h), [&](auto R) {
        const auto some = [&](auto P, int64_t i) {
          times_words<R(), P(), FloatWords>(x + h * stride, 4 * stride, panel + i * length * PANEL, 4 * length * PANEL,
                                            count, sums + (i * heads + h) * PANEL, heads * PANEL, 0);
        };
        int64_t i = 0;
        for (; i + WIDE <= num_panels; i += WIDE) some(std::integral_constant<int, WIDE>(), i);
        for (; i < num_panels; ++i) some(std::integral_constant<int, 1>(), i);
      });
  };
  const int64_t end = position + tokens;
  for (int64_t first = std::max<int64_t>(0, position - window + 1); first < end; first += MANY_KEYS) {
    const Number *keys[MANY_KEYS], *values[MANY_KEYS];
    const int64_t count = std::min(MANY_KEYS, end - first);
    blocks.find(table, first, count, kv_head, keys, values);
    in_panels(keys, count, D, panels);
    transpose(panels, size, transposed);
    std::fill_n(products, heads * MANY_KEYS, 0.0f);
    multiply(queries, D, D, transposed, (count + PANEL - 1) / PANEL, size, products);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t t = h / group, low = std::max<int64_t>(0, position + t - window + 1 - first);
      const int64_t high = std::min(count, position + t + 1 - first);  // it sees the keys from `low` to `high`
      float* own = weights + h * MANY_KEYS;
      if (low >= high) {
        std::fill_n(own, MANY_KEYS, 0.0f);
        continue;
      }
      for (int64_t j = 0; j < MANY_KEYS; j += PANEL)
        std::memcpy(own + j, products + (j / PANEL * heads + h) * PANEL, PANEL * sizeof(float));
      std::fill_n(own, low, none), std::fill_n(own + high, MANY_KEYS - high, none);
      float keep;
      const float more = weigh<MANY_KEYS>(own, maximum[h], keep);
      total_weight[h] = total_weight[h] * keep + more;
      for (int64_t d = 0; keep != 1 && d < size; d += PANEL)
        for (int64_t i = 0; i < PANEL; ++i) sums[d * heads + h * PANEL + i] *= keep;
    }
    in_panels(values, count, D, panels);
    multiply(weights, MANY_KEYS, count, panels, size / PANEL, MANY_KEYS, sums);
  }
  for (int64_t h = 0; h < heads; ++h) {
    float *own = sums + h * PANEL, *to = out + h / group * out_stride + h % group * D;
    for (int64_t d = 0; d < D; d += PANEL, own += heads * PANEL)
      for (int64_t i = 0; i < std::min(PANEL, D - d); ++i) to[d + i] = own[i] / total_weight[h];
  }
}

// One item: `tokens` <= QUERIES tokens, the first at `position`, times the `group` query heads of one key/value head.
// q: of the first token and head; a token's next head is head_dim further, the next token `stride`. out: likewise, with
// `out_stride`. A token sees the keys up to its own position, and of these only the last `window`.
template <typename Number>
inline void attend(const float* q, int64_t stride, int64_t tokens, int64_t group, int64_t position, int64_t window,
                   const Blocks<Number>& blocks, const int64_t* table, int64_t kv_head, float* out, int64_t out_stride) {
  const int64_t D = blocks.head_dim, heads = tokens * group;
  if (heads > TILE) return attend_many(q, stride, tokens, group, position, window, blocks, table, kv_head, out, out_stride);
  const float scale = 1 / std::sqrt(static_cast<float>(D)), none = -std::numeric_limits<float>::infinity();
  float maximum[TILE], sum[TILE];
  std::fill_n(maximum, heads, none), std::fill_n(sum, heads, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) std::fill_n(out + t * out_stride, group * D, 0.0f);
  const int64_t begin = std::max<int64_t>(0, position - window + 1), end = position + tokens;
  const Number *keys[KEYS], *values[KEYS], *next_keys[KEYS], *next_values[KEYS];
  blocks.find(table, begin, std::min(KEYS, end - begin), kv_head, next_keys, next_values);
  for (int64_t first = begin; first < end; first += KEYS) {
    const int64_t count = std::min(KEYS, end - first);
    std::copy_n(next_keys, count, keys), std::copy_n(next_values, count, values);
    std::fill(keys + count, keys + KEYS, keys[0]);
    blocks.find(table, first + count, std::min(KEYS, end - first - count), kv_head, next_keys, next_values);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t low = std::max<int64_t>(0, position + t - window + 1 - first);  // the keys that this token sees
      const int64_t high = std::min(count, position + t + 1 - first);
      if (low >= high) continue;
      const auto some = [&](auto HEADS, int64_t head) {
        const float* queries = q + t * stride + head * D;
        float scores[HEADS() * KEYS], keep[HEADS()];
        score<HEADS()>(queries, keys, D, scale, scores);
        for (int h = 0; h < HEADS(); ++h) {
          float *own = scores + h * KEYS, &all = sum[t * group + head + h];
          std::fill_n(own, low, none), std::fill_n(own + high, KEYS - high, none);
          const float more = weigh<KEYS>(own, maximum[t * group + head + h], keep[h]);
          all = all * keep[h] + more;
        }
        mix<HEADS()>(scores + low, values + low, high - low, D, keep, out + t * out_stride + head * D);
      };
      for (int64_t head = 0; head < group; head += FOLDED)
        with_rows<FOLDED>(std::min<int64_t>(FOLDED, group - head), [&](auto HEADS) { some(HEADS, head); });
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < group; ++g) {
      const float over = 1 / sum[t * group + g];
      for (int64_t d = 0; d < D; ++d) out[t * out_stride + g * D + d] *= over;
    }
}

}  // namespace inference_course

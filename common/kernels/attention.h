// Attention over block tables: keys and values are read where they lie, in blocks of any size, and copied nowhere.
//
// The work is divided into items: a request, a key/value head, and up to QUERIES of the request's new tokens. An item
// folds the heads of a group (lesson 3's `fold_groups`), so that it reads a key once for all of them, and goes through
// the keys in steps of KEYS with an online softmax (lesson 4's `merge_partials`).
#pragma once

#include <cmath>
#include <limits>

#include "products.h"

namespace inference_course {

constexpr int64_t KEYS = 16, QUERIES = 16;
constexpr int64_t MANY_KEYS = 32;  // keys in a step, where there are many queries

// One layer's blocks: (num_blocks, block_size, kv_heads, head_dim) each. Number: float, or uint16_t for a bfloat16.
template <typename Number>
struct Blocks {
  Number *keys, *values;
  int64_t block_size, kv_heads, head_dim;

  int64_t slot(const int64_t* table, int64_t position) const {
    return (table[position / block_size] * block_size + position % block_size) * kv_heads * head_dim;
  }

  // Where one head's keys and values of `count` positions lie, from `first` on.
  void find(const int64_t* table, int64_t first, int64_t count, int64_t kv_head, const Number** found_keys,
            const Number** found_values) const {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = slot(table, first + j) + kv_head * head_dim;
      found_keys[j] = keys + at, found_values[j] = values + at;
    }
  }
};

// Scores of one query and `count` <= KEYS keys, times `scale`. What lies beyond `count` is not written.
template <typename Number>
inline void score(const float* q, const Number* const* keys, int64_t count, int64_t head_dim, float scale, float* out) {
  for (int64_t j = 0; j < count; j += 4) {
    const Number* k[4];
    for (int i = 0; i < 4; ++i) k[i] = keys[std::min(j + i, count - 1)];
    vec sums[4] = {};
    int64_t whole = 0;
    for (; whole + LANES <= head_dim; whole += LANES) {
      const vec query = load<vec>(q + whole);
      for (int i = 0; i < 4; ++i) sums[i] += query * load_floats(k[i] + whole);
    }
    for (int64_t i = 0; i < std::min<int64_t>(4, count - j); ++i) {
      float sum = total(sums[i]);
      for (int64_t d = whole; d < head_dim; ++d) sum += q[d] * to_float(k[i][d]);
      out[j + i] = scale * sum;
    }
  }
}

// out (head_dim) = out * keep + sum of weights[j] * values[j], for `count` values.
template <typename Number>
inline void mix(const float* weights, const Number* const* values, int64_t count, int64_t head_dim, float keep, float* out) {
  int64_t d = 0;
  for (; d + 4 * LANES <= head_dim; d += 4 * LANES) {
    vec sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = load<vec>(out + d + i * LANES) * keep;
    for (int64_t j = 0; j < count; ++j)
      for (int i = 0; i < 4; ++i) sums[i] += weights[j] * load_floats(values[j] + d + i * LANES);
    for (int i = 0; i < 4; ++i) store(out + d + i * LANES, sums[i]);
  }
  for (; d + LANES <= head_dim; d += LANES) {
    vec sum = load<vec>(out + d) * keep;
    for (int64_t j = 0; j < count; ++j) sum += weights[j] * load_floats(values[j] + d);
    store(out + d, sum);
  }
  for (; d < head_dim; ++d) {
    out[d] *= keep;
    for (int64_t j = 0; j < count; ++j) out[d] += weights[j] * to_float(values[j][d]);
  }
}

// Rows of D floats in panels: (count, D) -> (D / 16, MANY_KEYS, 16), with 0 where there is nothing.
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

// Panels of 16 numbers as panels of 16 rows: (size / 16, MANY_KEYS, 16) -> (MANY_KEYS / 16, size, 16).
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

// As `attend`, for many queries: both products are those of matrices, so that a key or value in a register serves TILE
// queries. Arrays: queries (heads, D), scores and weights (heads, MANY_KEYS), sums (D / 16, heads, 16).
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
  const auto multiply = [heads](const float* x, int64_t stride, const float* panel, int64_t count, float* sums) {
    for (int64_t h = 0; h < heads; h += TILE)
      with_rows(std::min<int64_t>(TILE, heads - h), [&](auto R) {
        times_floats<R()>(x + h * stride, stride, panel, count, sums + h * PANEL, panel);
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
    for (int64_t j = 0; j < count; j += PANEL)
      multiply(queries, D, transposed + j * size, D, products + j * heads);
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
      const float highest = std::max(maximum[h], *std::max_element(own + low, own + high));
      vec part = {};
      for (int64_t j = 0; j < MANY_KEYS; j += LANES) {
        const vec weight = exponential(load<vec>(own + j) - highest);
        store(own + j, weight);
        part += weight;
      }
      if (highest > maximum[h]) {
        const float keep = std::exp(maximum[h] - highest);
        maximum[h] = highest, total_weight[h] *= keep;
        for (int64_t d = 0; d < size; d += PANEL)
          for (int64_t i = 0; i < PANEL; ++i) sums[d * heads + h * PANEL + i] *= keep;
      }
      total_weight[h] += total(part);
    }
    in_panels(values, count, D, panels);
    for (int64_t d = 0; d < D; d += PANEL) multiply(weights, MANY_KEYS, panels + d * MANY_KEYS, count, sums + d * heads);
  }
  for (int64_t h = 0; h < heads; ++h) {
    float *own = sums + h * PANEL, *to = out + h / group * out_stride + h % group * D;
    for (int64_t d = 0; d < D; d += PANEL, own += heads * PANEL)
      for (int64_t i = 0; i < std::min(PANEL, D - d); ++i) to[d + i] = own[i] / total_weight[h];
  }
}

// One item: `tokens` <= QUERIES tokens, the first at `position`, times the `group` query heads of one key/value head.
// q: of the first token and head; a token's next head is head_dim further, the next token `stride`. out: likewise, with
// `out_stride`. The keys up to each token's own position are seen, and of them only the last `window`. kv_head: which.
template <typename Number>
inline void attend(const float* q, int64_t stride, int64_t tokens, int64_t group, int64_t position, int64_t window,
                   const Blocks<Number>& blocks, const int64_t* table, int64_t kv_head, float* out, int64_t out_stride) {
  const int64_t D = blocks.head_dim, heads = tokens * group;
  if (heads > TILE) return attend_many(q, stride, tokens, group, position, window, blocks, table, kv_head, out, out_stride);
  const float scale = 1 / std::sqrt(static_cast<float>(D)), none = -std::numeric_limits<float>::infinity();
  std::vector<float> maximum(heads, none), sum(heads, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) std::fill_n(out + t * out_stride, group * D, 0.0f);
  const int64_t end = position + tokens;
  for (int64_t first = std::max<int64_t>(0, position - window + 1); first < end; first += KEYS) {
    const Number *keys[KEYS], *values[KEYS];
    const int64_t count = std::min(KEYS, end - first);
    blocks.find(table, first, count, kv_head, keys, values);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t low = std::max<int64_t>(0, position + t - window + 1 - first);  // the keys that this token sees
      const int64_t high = std::min(count, position + t + 1 - first);
      if (low >= high) continue;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = t * group + g;
        float scores[KEYS];
        std::fill_n(scores, KEYS, none);
        score(q + t * stride + g * D, keys + low, high - low, D, scale, scores + low);
        float highest = maximum[h];
        for (int64_t j = low; j < high; ++j) highest = std::max(highest, scores[j]);
        vec part = {};
        for (int64_t j = 0; j < KEYS; j += LANES) {
          const vec weight = exponential(load<vec>(scores + j) - highest);
          store(scores + j, weight);
          part += weight;
        }
        const float keep = std::exp(maximum[h] - highest);
        maximum[h] = highest, sum[h] = sum[h] * keep + total(part);
        mix(scores + low, values + low, high - low, D, keep, out + t * out_stride + g * D);
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < group; ++g) {
      const float over = 1 / sum[t * group + g];
      for (int64_t d = 0; d < D; ++d) out[t * out_stride + g * D + d] *= over;
    }
}

}  // namespace inference_course

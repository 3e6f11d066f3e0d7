// Attention over block tables: keys and values are read where they lie, in blocks of any size, and copied nowhere.
//
// The work is divided into items: a request, a key/value head, and up to QUERIES of the request's new tokens. An item
// folds the heads of a group (lesson 3's `fold_groups`), so that it reads a key once for all of them, and goes through
// the keys in steps of KEYS with an online softmax (lesson 4's `merge_partials`).
#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

namespace inference_course {

constexpr int64_t KEYS = 16, QUERIES = 16;

// One layer's blocks: (num_blocks, block_size, kv_heads, head_dim) each. Number: float, or uint16_t for a bfloat16.
template <typename Number>
struct Blocks {
  Number *keys, *values;
  int64_t block_size, kv_heads, head_dim;

  int64_t slot(const int64_t* table, int64_t position) const {
    return (table[position / block_size] * block_size + position % block_size) * kv_heads * head_dim;
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

// One item: `tokens` <= QUERIES tokens, the first at `position`, times the `group` query heads of one key/value head.
// q: of the first token and head; a token's next head is head_dim further, the next token `stride`. out: likewise, with
// `out_stride`. The keys up to each token's own position are seen, and of them only the last `window`. kv_head: which.
template <typename Number>
inline void attend(const float* q, int64_t stride, int64_t tokens, int64_t group, int64_t position, int64_t window,
                   const Blocks<Number>& blocks, const int64_t* table, int64_t kv_head, float* out, int64_t out_stride) {
  const int64_t D = blocks.head_dim, heads = tokens * group;
  const float scale = 1 / std::sqrt(static_cast<float>(D)), none = -std::numeric_limits<float>::infinity();
  std::vector<float> maximum(heads, none), sum(heads, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) std::fill_n(out + t * out_stride, group * D, 0.0f);
  const int64_t end = position + tokens;
  for (int64_t first = std::max<int64_t>(0, position - window + 1); first < end; first += KEYS) {
    const Number *keys[KEYS], *values[KEYS];
    const int64_t count = std::min(KEYS, end - first);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = blocks.slot(table, first + j) + kv_head * D;
      keys[j] = blocks.keys + at, values[j] = blocks.values + at;
    }
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

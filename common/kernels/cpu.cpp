// Products of a few rows with weights of eight and four bits: what torch on a CPU has no fast operator for.
//
// Decoding reads each weight once for a few rows, so what counts is the bytes that are read: here those of the packed
// weights, which become float32 in registers. From SOME_ROWS rows on arithmetic counts, and the float kernel is the
// better one: then a slice of the weight is unpacked into a scratch that fits into the cache, and multiplied as usual.
//
// x: (R, K) float32, contiguous. Returns (R, N) float32. One function a kind; shapes are the caller's to check.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace {

constexpr int64_t SOME_ROWS = 8;
constexpr int64_t SLICE = 1024;  // outputs that are unpacked at a time where there are many rows
constexpr int64_t BLOCK = 16;    // outputs in a block of a matrix of floats that is also looked up, as cpu.py says

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 12;  // floats in a register; rows of x whose sums fit into the registers
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 6;
#else
constexpr int LANES = 4, TILE = 6;
#endif
constexpr int64_t CHUNK = 96;  // rows of x that stay in the cache while a matrix is read
typedef float vec __attribute__((vector_size(4 * LANES)));

inline float wide(at::Half half) {
#ifdef __F16C__
  return _cvtsh_ss(half.x);
#else
  return static_cast<float>(half);
#endif
}

// Loops as simple as these the compiler turns into the widest vectors that the processor has.
inline float dot(const float* x, const float* w, int64_t K) {
  float sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += x[k] * w[k];
  return sum;
}

inline float dot(const float* x, const int8_t* w, int64_t K) {
  float sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += x[k] * static_cast<float>(w[k]);
  return sum;
}

// Sixteen at a time: the compiler unrolls a loop of known length, however short a group is.
inline void unpack_pairs(const uint8_t* __restrict pairs, float* __restrict low, float* __restrict high, int64_t count,
                         float step, float base) {
  int64_t j = 0;
  for (; j + 16 <= count; j += 16)
    for (int64_t l = j; l < j + 16; ++l) {
      low[l] = base + step * static_cast<float>(static_cast<int>(pairs[l]) & 15);
      high[l] = base + step * static_cast<float>(static_cast<int>(pairs[l]) >> 4);
    }
  for (; j < count; ++j) {
    low[j] = base + step * static_cast<float>(static_cast<int>(pairs[j]) & 15);
    high[j] = base + step * static_cast<float>(static_cast<int>(pairs[j]) >> 4);
  }
}

// Many rows: unpack(first, last, scratch) writes the weights of some outputs as floats, (last - first, K).
template <typename Unpack>
at::Tensor by_slices(const at::Tensor& x, int64_t N, int64_t K, Unpack unpack) {
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  at::Tensor scratch = at::empty({std::min(SLICE, N), K}, x.options());
  for (int64_t first = 0; first < N; first += SLICE) {
    const int64_t last = std::min(first + SLICE, N);
    float* out = scratch.data_ptr<float>();
    at::parallel_for(first, last, 32, [&](int64_t begin, int64_t end) { unpack(begin, end, out + (begin - first) * K); });
    y.slice(1, first, last).copy_(at::mm(x, scratch.slice(0, 0, last - first).t()));
  }
  return y;
}

at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale) {
  const int64_t R = x.size(0), K = x.size(1), N = weight.size(0);
  const int8_t* w = weight.data_ptr<int8_t>();
  const float* s = scale.data_ptr<float>();
  if (R > SOME_ROWS) {
    return by_slices(x, N, K, [&](int64_t begin, int64_t end, float* out) {
      for (int64_t n = begin; n < end; ++n, out += K)
        for (int64_t k = 0; k < K; ++k) out[k] = s[n] * static_cast<float>(w[n * K + k]);
    });
  }
  at::Tensor y = at::empty({R, N}, x.options());
  const float* in = x.data_ptr<float>();
  float* out = y.data_ptr<float>();
  at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> floats(R > 1 ? K : 0);
    for (int64_t n = begin; n < end; ++n) {
      const int8_t* row = w + n * K;
      if (R == 1) {
        out[n] = s[n] * dot(in, row, K);
        continue;
      }
      for (int64_t k = 0; k < K; ++k) floats[k] = static_cast<float>(row[k]);
      for (int64_t r = 0; r < R; ++r) out[r * N + n] = s[n] * dot(in + r * K, floats.data(), K);
    }
  });
  return y;
}

at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& minimum, int64_t group_size) {
  const int64_t R = x.size(0), K = x.size(1), N = weight.size(0), bytes = weight.size(1), groups = scale.size(1);
  const int64_t group_bytes = group_size / 2;
  const uint8_t* w = weight.data_ptr<uint8_t>();
  const at::Half* s = scale.data_ptr<at::Half>();
  const at::Half* m = minimum ? minimum->data_ptr<at::Half>() : nullptr;
  // Even columns first, then odd ones: each half of a byte has its place, and neighbours stay neighbours.
  const at::Tensor halves = at::cat({x.slice(1, 0, K, 2), x.slice(1, 1, K, 2)}, 1);
  const auto unpack = [&](int64_t begin, int64_t end, float* out) {
    for (int64_t n = begin; n < end; ++n, out += K)
      for (int64_t g = 0; g < groups; ++g) {
        const float step = wide(s[n * groups + g]), base = m ? wide(m[n * groups + g]) : -8 * step;
        const int64_t first = g * group_bytes, count = std::min(group_bytes, bytes - first);
        unpack_pairs(w + n * bytes + first, out + first, out + bytes + first, count, step, base);
      }
  };
  if (R > SOME_ROWS) return by_slices(halves, N, K, unpack);
  const float* in = halves.data_ptr<float>();
  at::Tensor y = at::empty({R, N}, x.options());
  float* out = y.data_ptr<float>();
  at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> floats(K);
    for (int64_t n = begin; n < end; ++n) {
      unpack(n, n + 1, floats.data());
      for (int64_t r = 0; r < R; ++r) out[r * N + n] = dot(in + r * K, floats.data(), K);
    }
  });
  return y;
}

// Rows of x times one block, whose outputs lie side by side for each k.
template <int R>
inline void times_block(const float* x, const float* block, float* y, int64_t K) {
  vec sums[R][BLOCK / LANES] = {};
  for (int64_t k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < BLOCK / LANES; ++i) {
        vec w;
        std::memcpy(&w, block + k * BLOCK + i * LANES, sizeof w);
        sums[r][i] += x[r * K + k] * w;
      }
  std::memcpy(y, sums, sizeof sums);
}

// weight: (blocks, K, 16), of which the last block may have outputs beyond N.
at::Tensor blocked_linear(const at::Tensor& x, const at::Tensor& weight, int64_t N) {
  const int64_t R = x.size(0), K = x.size(1);
  at::Tensor y = at::empty({R, N}, x.options());
  const float *in = x.data_ptr<float>(), *w = weight.data_ptr<float>();
  float* out = y.data_ptr<float>();
  for (int64_t first = 0; first < R; first += CHUNK)
    at::parallel_for(0, weight.size(0), 16, [&](int64_t begin, int64_t end) {
      float sums[TILE * BLOCK];
      for (int64_t b = begin; b < end; ++b)
        for (int64_t r = first, last = std::min(first + CHUNK, R), count; r < last; r += count) {
          const float *rows = in + r * K, *block = w + b * K * BLOCK;
          if (last - r >= TILE) times_block<TILE>(rows, block, sums, K), count = TILE;
          else if (last - r >= 4) times_block<4>(rows, block, sums, K), count = 4;
          else if (last - r >= 2) times_block<2>(rows, block, sums, K), count = 2;
          else times_block<1>(rows, block, sums, K), count = 1;
          const size_t bytes = std::min(BLOCK, N - b * BLOCK) * sizeof(float);
          for (int64_t i = 0; i < count; ++i) std::memcpy(out + (r + i) * N + b * BLOCK, sums + i * BLOCK, bytes);
        }
    });
  return y;
}

}  // namespace

TORCH_LIBRARY(inference_course, library) {
  library.def("blocked_linear(Tensor x, Tensor weight, int outputs) -> Tensor", &blocked_linear);
  library.def("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor", &int8_linear);
  library.def("int4_linear(Tensor x, Tensor weight, Tensor scale, Tensor? minimum, int group_size) -> Tensor",
              &int4_linear);
}

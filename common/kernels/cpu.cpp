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
#include <optional>
#include <vector>

namespace {

constexpr int64_t SOME_ROWS = 8;
constexpr int64_t SLICE = 1024;  // outputs that are unpacked at a time where there are many rows

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

}  // namespace

TORCH_LIBRARY(inference_course, library) {
  library.def("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor", &int8_linear);
  library.def("int4_linear(Tensor x, Tensor weight, Tensor scale, Tensor? minimum, int group_size) -> Tensor",
              &int4_linear);
}

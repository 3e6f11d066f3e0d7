// Vectors as wide as those of the processor that this is compiled for (-march=native): one source for all processors.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
constexpr int LANES = 16, TILE = 12;  // floats in a register; rows whose sums of 16 outputs fit into the registers
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE = 6;
#else
constexpr int LANES = 4, TILE = 6;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int16_t hvec __attribute__((vector_size(4 * LANES)));  // two to a lane
typedef int8_t bvec __attribute__((vector_size(2 * LANES)));   // two to a lane
typedef uint16_t uhvec __attribute__((vector_size(2 * LANES)));

template <typename Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector>
inline void store(void* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

// Four of the eight floats in x and y, by their numbers.
template <int A, int B, int C, int D>
inline quad pick(quad x, quad y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, A, B, C, D);
#else
  typedef int32_t numbers __attribute__((vector_size(16)));
  return __builtin_shuffle(x, y, numbers{A, B, C, D});
#endif
}

// Prefetches a line into the second cache. The address need not be valid.
inline void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Keeps a vector in a register. Otherwise gcc reads it from memory again for each use, and spills the sums.
template <typename Vector>
inline void keep(Vector& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// The sum of all lanes, by halves: lane after lane, each addition would wait for the last one.
inline float total(vec v) {
  quad q[LANES / 4];
  std::memcpy(q, &v, sizeof v);
  for (int i = 1; i < LANES / 4; ++i) q[0] += q[i];
  return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// The totals of LANES vectors, in one vector.
inline vec totals(const vec* v) {
#if defined(__AVX512BW__)
  const auto add_halves = [](vec a, vec b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); };
  vec q[4];  // in each quarter of q[i]: what v[4 * i] to v[4 * i + 3] have there, added up
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)add_halves(v[4 * i], v[4 * i + 1]), b = (__m512d)add_halves(v[4 * i + 2], v[4 * i + 3]);
    q[i] = (vec)_mm512_unpacklo_pd(a, b) + (vec)_mm512_unpackhi_pd(a, b);
  }
  const vec low = _mm512_shuffle_f32x4(q[0], q[1], 0x44) + _mm512_shuffle_f32x4(q[0], q[1], 0xee);
  const vec high = _mm512_shuffle_f32x4(q[2], q[3], 0x44) + _mm512_shuffle_f32x4(q[2], q[3], 0xee);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
#elif defined(__AVX2__)
  const vec low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const vec high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
#else
  vec all;
  for (int i = 0; i < LANES; ++i) all[i] = total(v[i]);
  return all;
#endif
}

// The largest number, by halves as in `total`. The result is undefined if there is a NaN.
inline float largest(vec v) {
  quad q[LANES / 4];
  std::memcpy(q, &v, sizeof v);
  for (int i = 1; i < LANES / 4; ++i) q[0] = q[i] > q[0] ? q[i] : q[0];
  const float a = q[0][0] > q[0][2] ? q[0][0] : q[0][2], b = q[0][1] > q[0][3] ? q[0][1] : q[0][3];
  return a > b ? a : b;
}

inline float sum(const float* x, int64_t count) {
  vec part = {};
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) part += load<vec>(x + k);
  float all = total(part);
  for (; k < count; ++k) all += x[k];
  return all;
}

// Widens two numbers of eight bits in each lane to sixteen. (gcc 12 makes four instructions of the general form.)
inline hvec widen(bvec v) {
#if defined(__AVX512BW__)
  return (hvec)_mm512_cvtepi8_epi16((__m256i)v);
#elif defined(__AVX2__)
  return (hvec)_mm256_cvtepi8_epi16((__m128i)v);
#else
  return __builtin_convertvector(v, hvec);
#endif
}

// Reads LANES numbers as floats. A bfloat16, here in a uint16_t, is the upper half of a float.
inline vec load_floats(const float* from) { return load<vec>(from); }

inline vec load_floats(const uint16_t* from) {
  const uhvec halves = load<uhvec>(from);
#if defined(__AVX512BW__)
  const ivec wide = (ivec)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  const ivec wide = (ivec)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  const ivec wide = __builtin_convertvector(halves, ivec);
#endif
  return (vec)(wide << 16);
}

inline float to_float(float x) { return x; }

inline float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// Stores floats as they are, or rounded to the nearest bfloat16, of two equally near ones the even one. NaN stays NaN.
inline void round_to(float* to, const float* from, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

inline void round_to(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// sums + a[0] * b[0] + a[1] * b[1] in each lane: exact, since a product of two numbers of eight bits has fifteen.
inline ivec add_pairs(ivec sums, hvec a, hvec b) {
#if defined(__AVX512BW__)
  return sums + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sums + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sums + (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const ivec x = (ivec)a, y = (ivec)b;
  return sums + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// sums + a[0] * b[0] + ... + a[3] * b[3] in each lane, exact. a: bytes from 0 to 255; b: from -128 to 127. Only where one
// instruction does it. It is written in assembly, because gcc 12 copies registers around its intrinsic.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HAS_QUADS true
#else
#define HAS_QUADS false
#endif

inline ivec add_quads(ivec sums, ivec a, ivec b) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b));
#endif
  return sums;
}

// sums + a[0] * b[0] + a[1] * b[1] in each lane, whose halves are bfloat16. Only where one instruction does it.
#if defined(__AVX512BF16__)
constexpr bool HAS_BFLOATS = true;
#else
constexpr bool HAS_BFLOATS = false;
#endif

inline vec add_bfloats(vec sums, ivec a, ivec b) {
#if defined(__AVX512BF16__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
#endif
  return sums;
}

// Sums of products of numbers from 0 to 15 and from -127 to 127, in lanes of four bytes, exact. Where an instruction adds
// pairs in sixteen bits, OCTS steps of `add_octs` fit into a Partial: 4 * 4 * 15 * 127 < 2**15. `whole` adds up the pairs.
#if defined(__AVX2__) && !HAS_QUADS
constexpr int64_t OCTS = 4;
typedef hvec Partial;
inline ivec whole(hvec sums) { return add_pairs(ivec{}, sums, hvec{} + 1); }
#else
constexpr int64_t OCTS = 1 << 30;
typedef ivec Partial;
inline ivec whole(ivec sums) { return sums; }
#endif

// sums + low . x[0..3] + high . x[4..7] in each lane. low, high: four bytes each; x: the same in all lanes.
inline Partial add_octs(Partial sums, ivec low, ivec high, const int8_t* x) {
  const ivec first = load<int32_t>(x) - ivec{}, second = load<int32_t>(x + 4) - ivec{};
#if HAS_QUADS
  return add_quads(add_quads(sums, low, first), high, second);
#elif defined(__AVX512BW__)
  sums += (hvec)_mm512_maddubs_epi16((__m512i)low, (__m512i)first);
  return sums + (hvec)_mm512_maddubs_epi16((__m512i)high, (__m512i)second);
#elif defined(__AVX2__)
  sums += (hvec)_mm256_maddubs_epi16((__m256i)low, (__m256i)first);
  return sums + (hvec)_mm256_maddubs_epi16((__m256i)high, (__m256i)second);
#else
  for (int i = 0; i < 4; ++i) sums += ((low >> 8 * i) & 15) * x[i] + ((high >> 8 * i) & 15) * x[4 + i];
  return sums;
#endif
}

// The nearest whole number, of two equally near ones the even one, for magnitudes below 2**22.
inline vec nearest(vec x) { return (x + 12582912.0f) - 12582912.0f; }

// exp(x), to 2e-7 of it; 0 below -87, and NaN for NaN. x: at most 88.
inline vec exponential(vec x) {
  const ivec none = x < -87.0f;
  const vec whole = nearest(x * 1.44269504f);
  const vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // exp(x) = 2**whole * exp(r), |r| < 0.35
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec bounded = (vec)((ivec)whole & ~none);
  const vec power = (vec)((__builtin_convertvector(bounded, ivec) + 127) << 23);
  return (vec)((ivec)(p * power) & ~none);
}

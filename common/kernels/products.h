// Products of rows of activations with a matrix in panels (linear.h).
//
// Decoding reads each weight once for a few rows, so its time depends on the bytes that are read. With many rows it depends
// on arithmetic: a panel of few bits is converted to floats once, in the cache, for all rows of a chunk.
#pragma once

#include <type_traits>

#include "linear.h"

namespace inference_course {

constexpr int WIDE = LANES == 16 ? 2 : 1;  // panels at a time: TILE rows' sums with all of them fit into the registers
constexpr int UNROLLED = LANES == 16 ? 1 : 4;  // unrolled by 4, gcc 12 stores AVX512's sums to memory in every step
constexpr int64_t SLICE = WIDE == 1 ? 256 : 576;  // inputs of a panel, at most, that stay in the first or second cache
constexpr int64_t CHUNK = 96;         // the most rows whose sums are kept
constexpr int64_t FEW_ROWS = 4;       // up to this number of rows, few bits are converted to floats in registers
constexpr int OCT_TILE = LANES == 16 ? TILE : 4;  // rows of W4A8 whose sums fit into the registers
constexpr int64_t CACHED = 144 << 10;  // floats of x that stay in the second cache, or nearly, while the panels pass

// P panels are multiplied by at a time, PARTS vectors of outputs; each number of a row is read once for all of them.
template <int P>
constexpr int PARTS = P * PANEL / LANES;

// Where part i begins, in units of which a vector has `size` and neighbouring panels are `apart`.
constexpr int64_t place(int i, int64_t apart, int64_t size = LANES) {
  return i / (PANEL / LANES) * apart + i % (PANEL / LANES) * size;
}

// Products of words. `spread` copies four bytes of a row to all lanes, `read` reads the weights for them, and `add` adds
// their product to a sum. A word is a float, four numbers of eight bits, or two of sixteen.
struct FloatWords {
  typedef vec Sum;
  static constexpr int BYTES = 4 * LANES;
  static vec spread(const uint8_t* from) { return load<float>(from) - vec{}; }
  static vec read(const uint8_t* from) { return load<vec>(from); }
  static vec add(vec sums, vec w, vec x) { return sums + x * w; }
};

struct Words {
  static constexpr int BYTES = 4 * LANES;
  static ivec spread(const uint8_t* from) { return load<int32_t>(from) - ivec{}; }
  static ivec read(const uint8_t* from) { return load<ivec>(from); }
};

struct Quads : Words {
  typedef ivec Sum;
  static ivec add(ivec sums, ivec w, ivec x) { return add_quads(sums, w, x); }
};

struct BfloatPairs : Words {
  typedef vec Sum;
  static vec add(vec sums, ivec w, ivec x) { return add_bfloats(sums, w, x); }
};

struct WidePairs : Words {  // of sixteen bits each
  typedef ivec Sum;
  static ivec add(ivec sums, ivec w, ivec x) { return add_pairs(sums, (hvec)w, (hvec)x); }
};

struct NarrowPairs : WidePairs {  // a weight has eight bits, a row's number sixteen
  static constexpr int BYTES = 2 * LANES;
  static ivec read(const uint8_t* from) { return (ivec)widen(load<bvec>(from)); }
};

// R rows times `count` words of P panels, (count, 16 words). stride and apart: the bytes from a row or a panel to the next.
// Adds to sums, (R, 16) for each panel, the next one `sums_apart` numbers further. ahead: the bytes from each panel to the
// one that comes next, which is prefetched.
template <int R, int P, typename Kind, typename Number>
inline void times_words(const void* rows, int64_t stride, const void* panels, int64_t apart, int64_t count, Number* sums,
                        int64_t sums_apart, int64_t ahead) {
  const uint8_t *x = static_cast<const uint8_t*>(rows), *panel = static_cast<const uint8_t*>(panels);
  constexpr int64_t SIZE = PANEL / LANES * Kind::BYTES;
  typedef typename Kind::Sum Sum;
  Sum s[R][PARTS<P>];
  decltype(Kind::read(panel)) w[PARTS<P>];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS<P>; ++i) s[r][i] = load<Sum>(sums + r * PANEL + place(i, sums_apart));
#pragma GCC unroll UNROLLED
  for (int64_t k = 0; k < count; ++k) {
    for (int i = 0; i < P; ++i) fetch(panel + i * apart + k * SIZE + ahead);
    for (int i = 0; i < PARTS<P>; ++i) keep(w[i] = Kind::read(panel + k * SIZE + place(i, apart, Kind::BYTES)));
    for (int r = 0; r < R; ++r) {
      auto word = Kind::spread(x + r * stride + 4 * k);
      keep(word);
      for (int i = 0; i < PARTS<P>; ++i) s[r][i] = Kind::add(s[r][i], w[i], word);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS<P>; ++i) store(sums + r * PANEL + place(i, sums_apart), s[r][i]);
}

// Widens `count` pairs of a panel to sixteen bits each. next: as many pairs, which are prefetched.
inline void widen_pairs(const int8_t* pairs, int64_t count, const int8_t* next, int16_t* wide) {
  for (int64_t k = 0; k < count; ++k, pairs += 2 * PANEL, next += 2 * PANEL, wide += 2 * PANEL) {
    fetch(next);
    for (int i = 0; i < 2 * PANEL; i += 2 * LANES) store(wide + i, widen(load<bvec>(pairs + i)));
  }
}

// The weights of INPUTS inputs for LANES outputs, in BYTES bytes; [j] returns those of input j, as floats. CHAINS: the
// number of sums to which a single row's products are added in turn. With one sum each addition waits for the last one.
struct Bfloats {
  static constexpr int INPUTS = 2, BYTES = 4 * LANES, CHAINS = 1;  // so that sums equal those of floats
  ivec both;
  explicit Bfloats(const void* from) : both(load<ivec>(from)) {}
  vec operator[](int j) const { return (vec)(j ? both & ~0xffff : both << 16); }
};

struct Pair {
  static constexpr int INPUTS = 2, BYTES = 2 * LANES, CHAINS = 2;
  ivec both;
  explicit Pair(const void* from) : both((ivec)widen(load<bvec>(from))) {}
  vec operator[](int j) const { return __builtin_convertvector(j ? both >> 16 : (both << 16) >> 16, vec); }
};

struct Oct {
  static constexpr int INPUTS = 8, BYTES = 4 * LANES, CHAINS = 4;
  ivec all;
  explicit Oct(const void* from) : all(load<ivec>(from)) {}
  vec operator[](int j) const { return __builtin_convertvector((all >> (j % 4 * 8 + j / 4 * 4)) & 15, vec); }
};

// Like times_words, for weights that are converted to floats in registers, once for all R rows.
template <int R, typename Packed>
inline void times_packed(const float* x, int64_t stride, const uint8_t* panel, int64_t count, float* sums) {
  constexpr int PARTS = PANEL / LANES, INPUTS = Packed::INPUTS, CHAINS = R == 1 ? Packed::CHAINS : 1;
  vec s[CHAINS][R][PARTS] = {};
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) s[0][r][i] = load<vec>(sums + r * PANEL + i * LANES);
  const auto step = [&](const float* in, int inputs) {
    for (int i = 0; i < PARTS; ++i, panel += Packed::BYTES) {
      const Packed packed(panel);
#pragma GCC unroll 8
      for (int j = 0; j < inputs; ++j) {
        const vec w = packed[j];
        for (int r = 0; r < R; ++r) s[j % CHAINS][r][i] += in[r * stride + j] * w;
      }
    }
  };
  int64_t k = 0;
  for (; k + INPUTS <= count; k += INPUTS) step(x + k, INPUTS);
  if (k < count) {
    float rest[R * INPUTS] = {};  // padded with 0
    for (int r = 0; r < R; ++r) std::memcpy(rest + r * INPUTS, x + r * stride + k, (count - k) * sizeof(float));
    x = rest, stride = INPUTS;
    step(rest, INPUTS);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) {
      for (int c = 1; c < CHAINS; ++c) s[0][r][i] += s[c][r][i];
      store(sums + r * PANEL + i * LANES, s[0][r][i]);
    }
}

// One group of a panel of INT4: its numbers, its scales, and the value of the number 0.
struct Group {
  const uint8_t* numbers;
  vec scale[PANEL / LANES], base[PANEL / LANES];

  Group(const Linear& w, int64_t panel, int64_t group) {
    const int64_t at = (panel * w.num_groups + group) * PANEL;
    numbers = w.packed + at * 4 * w.octs();
    for (int i = 0; i < PANEL / LANES; ++i) {
      scale[i] = halves(w.group_scales + at + i * LANES);
      base[i] = w.group_minima ? halves(w.group_minima + at + i * LANES) : -8 * scale[i];
    }
  }

  static vec halves(const at::Half* from) {
#if defined(__AVX512BW__)
    return (vec)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vec)_mm256_cvtph_ps(load<__m128i>(from));
#else
    vec v;
    for (int i = 0; i < LANES; ++i) v[i] = from[i];
    return v;
#endif
  }
};

// R rows from `row` on times a panel of INT4. Of each group, x . number is multiplied by the scale, and the sum of x by the
// value of the number 0. sums: (R, 16).
template <int R>
inline void times_groups(const Linear& w, const Rows& x, int64_t row, int64_t panel, float* sums) {
  constexpr int PARTS = PANEL / LANES;
  const float* in = x.floats + row * x.stride;
  for (int64_t first = 0, group = 0; first < w.K; first += w.group_size, ++group) {
    const Group of(w, panel, group);
    float parts[R * PANEL] = {};
    times_packed<R, Oct>(in + first, x.stride, of.numbers, std::min(w.group_size, w.K - first), parts);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < PARTS; ++i) {
        float* to = sums + r * PANEL + i * LANES;
        const vec part = load<vec>(parts + r * PANEL + i * LANES) * of.scale[i];
        store(to, load<vec>(to) + part + x.sums[(row + r) * w.num_groups + group] * of.base[i]);
      }
  }
}

// The same for rows of whole numbers, which have 8 * octs numbers for each group, padded with 0.
template <int R>
inline void times_octs(const Linear& w, const Rows& x, int64_t row, int64_t panel, float* sums) {
  constexpr int PARTS = PANEL / LANES;
  const int8_t* numbers = static_cast<const int8_t*>(x.numbers) + row * x.stride;
  vec s[R][PARTS] = {};
  for (int64_t group = 0; group < w.num_groups; ++group) {
    const Group of(w, panel, group);
    const uint8_t* from = of.numbers;
    ivec exact[R][PARTS] = {};
    for (int64_t left = w.octs(); left > 0; left -= OCTS) {
      Partial partial[R][PARTS] = {};
      for (int64_t oct = 0; oct < std::min(OCTS, left); ++oct, numbers += 8) {
        fetch(from + w.num_groups * 4 * w.octs() * PANEL);
        for (int i = 0; i < PARTS; ++i, from += 4 * LANES) {
          const ivec both = load<ivec>(from), low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
          for (int r = 0; r < R; ++r) partial[r][i] = add_octs(partial[r][i], low, high, numbers + r * x.stride);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < PARTS; ++i) exact[r][i] += whole(partial[r][i]);
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < PARTS; ++i)
        s[r][i] += __builtin_convertvector(exact[r][i], vec) * of.scale[i] +
                   x.sums[(row + r) * w.num_groups + group] * of.base[i];
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) store(sums + r * PANEL + i * LANES, s[r][i] * x.scales[row + r]);
}

// Calls `call` with `rows`, 1 to TILE, as a constant of the type std::integral_constant.
template <int R = TILE, typename Call>
inline void with_rows(int64_t rows, Call call) {
  if constexpr (R > 0) {
    if (rows == R) call(std::integral_constant<int, R>());
    else with_rows<R - 1>(rows, call);
  }
}

// Converts `count` inputs to floats, (count, 16): times `scale`, plus `base`, (16) each, if these are given. What is `ahead`
// bytes further is prefetched.
template <typename Packed>
inline void unpack(const uint8_t* from, int64_t count, int64_t ahead, float* out, const vec* scale = nullptr,
                   const vec* base = nullptr) {
  constexpr int INPUTS = Packed::INPUTS;
  for (int64_t k = 0; k < count; k += INPUTS) {
    fetch(from + ahead);
    for (int i = 0; i < PANEL / LANES; ++i, from += Packed::BYTES) {
      const Packed packed(from);
      const auto put = [&](int j) {
        store(out + (k + j) * PANEL + i * LANES, scale ? base[i] + scale[i] * packed[j] : packed[j]);
      };
      if (k + INPUTS <= count) {
#pragma GCC unroll 8
        for (int j = 0; j < INPUTS; ++j) put(j);
      } else {
        for (int j = 0; k + j < count; ++j) put(j);
      }
    }
  }
}

// Converts inputs `first` to `last` of a panel to floats, (last - first, 16). INT8's scale is applied to the sums later.
// `first` is even, and the first input of a group.
inline void unpack(const Linear& w, int64_t panel, int64_t first, int64_t last, float* out) {
  const int64_t size = w.words() * 2 * PANEL, at = panel * size + first * PANEL;
  if (w.kind == INT8) return unpack<Pair>(w.packed + at, last - first, size, out);
  if (w.kind == BFLOATS) return unpack<Bfloats>(w.packed + 2 * at, last - first, 2 * size, out);
  for (int64_t k = first; k < last; k += w.group_size, out += w.group_size * PANEL) {
    const Group of(w, panel, k / w.group_size);
    unpack<Oct>(of.numbers, std::min(w.group_size, last - k), w.num_groups * 4 * w.octs() * PANEL, out, of.scale, of.base);
  }
}

// Floats of a thread, with any values. The memory is kept from call to call.
struct Scratch {
  float* floats = nullptr;
  explicit Scratch(int64_t size) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
    floats = kept.data();
  }
};

// The size of a slice, a multiple of `unit`: all slices are about as large, at most SLICE or one unit.
inline int64_t slice_size(int64_t all, int64_t unit = 1) {
  const int64_t units = (all + unit - 1) / unit, most = std::max<int64_t>(1, SLICE / unit), slices = (units + most - 1) / most;
  return (units + slices - 1) / slices * unit;
}

// The products of `rows` <= CHUNK rows from `first` on with P panels, the next one `apart` panels further, with scale and
// bias. bias: (N), or nullptr. sums: (P, CHUNK, 16). A slice of the panels stays in a cache for all rows.
template <int P>
inline void times_panels(const Linear& w, const float* bias, const Rows& x, int64_t first, int64_t rows, int64_t panel,
                         int64_t apart, float* sums) {
  const int64_t size = w.words() * w.neighbours() * PANEL;  // numbers of a panel, in kinds without groups
  const int64_t steps = P > 1 && apart == 1 ? P : 1;        // panels from these to the ones that come next
  const float* in = x.floats + first * x.stride;
  const auto tiles = [](int64_t rows, auto most, auto compute) {  // compute(R, row) for each tile of R <= most rows
    const int64_t count = (rows + most() - 1) / most();
    for (int64_t i = 0, r = 0; i < count; ++i) {
      const int64_t next = rows * (i + 1) / count;
      with_rows<most()>(next - r, [&](auto R) { compute(R, r); });
      r = next;
    }
  };
  constexpr std::integral_constant<int, TILE> tile;
  const int64_t planes = w.planes(), all_rows = rows * planes;  // each plane counts as a row
  const auto words = [&](auto kind, int64_t word, int64_t count, const uint8_t* from, int64_t bytes_apart, auto* to,
                         int64_t ahead) {
    const uint8_t* in = static_cast<const uint8_t*>(x.numbers) + first * x.stride + 4 * word;
    const int64_t stride = x.stride / planes;
    tiles(all_rows, tile, [&](auto R, int64_t r) {
      times_words<R(), P, decltype(kind)>(in + r * stride, stride, from, bytes_apart, count, to + r * PANEL, CHUNK * PANEL,
                                          ahead);
    });
  };
  if (w.kind == W8A8 || w.has_quads()) {
    int32_t exact[P * CHUNK * PANEL];
    for (int i = 0; i < P; ++i)
      for (int64_t r = 0; r < all_rows; ++r)  // a weight is 128 too large where there are quads
        std::fill_n(exact + (i * CHUNK + r) * PANEL, PANEL,
                    HAS_QUADS ? -128 * static_cast<int32_t>(x.sums[first * planes + r]) : 0);
    const Scratch scratch(HAS_QUADS ? 0 : P * SLICE * PANEL);
    int16_t* wide = reinterpret_cast<int16_t*>(scratch.floats);
    for (int64_t k = 0, step = slice_size(w.words()); k < w.words(); k += step) {
      const int64_t count = std::min(step, w.words() - k);
      const uint8_t* from = w.packed + panel * size + w.neighbours() * PANEL * k;
      if (HAS_QUADS) {
        words(Quads(), k, count, from, apart * size, exact, steps * size);
      } else if (rows > TILE) {
        for (int i = 0; i < P; ++i) {
          const int8_t* pairs = reinterpret_cast<const int8_t*>(from) + i * apart * size;
          widen_pairs(pairs, count, pairs + size, wide + i * 2 * SLICE * PANEL);
        }
        words(WidePairs(), k, count, reinterpret_cast<const uint8_t*>(wide), 4 * SLICE * PANEL, exact, 0);
      } else {
        words(NarrowPairs(), k, count, from, apart * size, exact, steps * size);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < PARTS<P>; ++i) {
        const int32_t* own = exact + r * planes * PANEL + place(i, CHUNK * PANEL);
        vec whole = __builtin_convertvector(load<ivec>(own), vec);
        if (planes == 2) whole = 256 * whole + __builtin_convertvector(load<ivec>(own + PANEL), vec);
        store(sums + r * PANEL + place(i, CHUNK * PANEL), whole * x.scales[first + r]);
      }
  } else if (w.kind == W4A8) {
    for (int i = 0; i < P; ++i)
      tiles(rows, std::integral_constant<int, OCT_TILE>(), [&](auto R, int64_t r) {
        times_octs<R()>(w, x, first + r, panel + i * apart, sums + (i * CHUNK + r) * PANEL);
      });
  } else {
    for (int i = 0; i < P; ++i) std::fill_n(sums + i * CHUNK * PANEL, rows * PANEL, 0.0f);
    if (w.kind == BFLOATS && HAS_BFLOATS) {
      for (int64_t k = 0, step = slice_size(w.words()); k < w.words(); k += step)
        words(BfloatPairs(), k, std::min(step, w.words() - k), w.packed + 2 * panel * size + 4 * PANEL * k, 2 * apart * size,
              sums, 2 * steps * size);
    } else if (w.kind != FLOATS && rows <= FEW_ROWS) {
      for (int i = 0; i < P; ++i)
        with_rows<FEW_ROWS>(rows, [&](auto R) {
          const int64_t number = panel + i * apart;
          float* own = sums + i * CHUNK * PANEL;
          if (w.kind == INT4) times_groups<R()>(w, x, first, number, own);
          if (w.kind == INT8) times_packed<R(), Pair>(in, x.stride, w.packed + number * size, w.K, own);
          if (w.kind == BFLOATS) times_packed<R(), Bfloats>(in, x.stride, w.packed + 2 * number * size, w.K, own);
        });
    } else {
      const int64_t step = slice_size(w.K, w.kind == INT4 ? w.group_size : 2), all = w.K * PANEL;
      const Scratch scratch(w.kind == FLOATS ? 0 : P * step * PANEL);
      for (int64_t k = 0; k < w.K; k += step) {
        const int64_t end = std::min(k + step, w.K);
        const float* slice = scratch.floats;
        if (w.kind == FLOATS) slice = reinterpret_cast<const float*>(w.packed) + panel * all + k * PANEL;
        else for (int i = 0; i < P; ++i) unpack(w, panel + i * apart, k, end, scratch.floats + i * step * PANEL);
        const int64_t between = w.kind == FLOATS ? apart * all : step * PANEL, ahead = w.kind == FLOATS ? steps * all : 0;
        tiles(rows, tile, [&](auto R, int64_t r) {
          times_words<R(), P, FloatWords>(in + r * x.stride + k, 4 * x.stride, slice, 4 * between, end - k,
                                          sums + r * PANEL, CHUNK * PANEL, 4 * ahead);
        });
      }
    }
  }
  for (int i = 0; i < P; ++i, panel += apart) {
    const int64_t outputs = std::min(PANEL, w.N - panel * PANEL);
    const float* scale = w.kind == INT8 || w.kind == W8A8 ? w.scale.const_data_ptr<float>() + panel * PANEL : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      float* own = sums + (i * CHUNK + r) * PANEL;
      for (int j = 0; scale && j < PANEL; ++j) own[j] *= scale[j];
      for (int64_t j = 0; bias && j < outputs; ++j) own[j] += bias[panel * PANEL + j];
    }
  }
}

// Divides a product among threads into parts: some rows times some panels. Parts of the same rows follow each other, so that
// the rows stay in the second cache. Each thread has several parts, so that others help one that other processes delay.
struct Division {
  int64_t panels, chunk, step, parts_of_a_chunk, size;

  Division(const Linear& w, int64_t rows, int64_t panels, int64_t threads)
      : panels(panels), chunk(std::clamp<int64_t>(CACHED / w.K / TILE * TILE, 2 * TILE, CHUNK) / w.planes()) {
    const int64_t unit = rows > TILE ? WIDE : 1;  // with few rows memory counts, and more parts take longer to read
    step = std::max<int64_t>(1, panels / (6 * threads * unit)) * unit;
    parts_of_a_chunk = (panels + step - 1) / step;
    size = (rows + chunk - 1) / chunk * parts_of_a_chunk;
  }
};

// Computes one part, and with COUNT = 2 also the panels that are `apart` after its own. Calls done(panel, first row, rows,
// sums), with sums (rows, 16), and those of the second panel CHUNK * 16 further.
template <int COUNT, typename Done>
inline void product(const Linear& w, const float* bias, const Rows& x, const Division& parts, int64_t part, int64_t apart,
                    Done done) {
  float sums[std::max(COUNT, WIDE) * CHUNK * PANEL];
  const int64_t first = part / parts.parts_of_a_chunk * parts.chunk, rows = std::min(parts.chunk, x.count - first);
  const int64_t begin = part % parts.parts_of_a_chunk * parts.step, end = std::min(begin + parts.step, parts.panels);
  for (int64_t panel = begin; panel < end; ++panel) {
    if (COUNT < WIDE && panel + 1 < end) {  // two neighbours
      times_panels<WIDE>(w, bias, x, first, rows, panel, 1, sums);
      done(panel, first, rows, sums), done(++panel, first, rows, sums + CHUNK * PANEL);
    } else if (COUNT == WIDE) {
      times_panels<COUNT>(w, bias, x, first, rows, panel, apart, sums);
      done(panel, first, rows, sums);
    } else {
      for (int i = 0; i < COUNT; ++i)
        times_panels<1>(w, bias, x, first, rows, panel + i * apart, 0, sums + i * CHUNK * PANEL);
      done(panel, first, rows, sums);
    }
  }
}

}  // namespace inference_course

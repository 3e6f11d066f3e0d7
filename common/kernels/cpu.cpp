// Operators for a CPU: a linear layer, and the two halves of a decoder layer, with matrices in panels (products.h).
//
// torch starts a parallel region for each of its operators, some twenty in a layer, and Python takes longer to call them
// than a small model takes to compute one. Here a layer is two regions, and in a region the threads wait for each other
// only where they need each other's results: at the end of each `omp for`.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "attention.h"
#include "products.h"

namespace inference_course {

inline int64_t threads() {
  at::internal::lazy_init_num_threads();
  return omp_get_max_threads();
}

// Uninitialised floats: a std::vector would set them to 0 first.
struct Floats {
  std::unique_ptr<float[]> numbers;
  explicit Floats(int64_t size) : numbers(new float[size]) {}
  float& operator[](int64_t i) const { return numbers[i]; }
  float* data() const { return numbers.get(); }
};

inline const float* floats(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// x: (..., K); bias: (N); most: (...), largest magnitudes over all ranks, if each has a part of a row. Returns (..., N).
at::Tensor apply(const c10::intrusive_ptr<Linear>& layer, const at::Tensor& input, const std::optional<at::Tensor>& bias,
                 const std::optional<at::Tensor>& most) {
  const Linear& w = *layer;
  const at::Tensor x = input.contiguous();
  const int64_t R = x.numel() / w.K;
  auto shape = x.sizes().vec();
  shape.back() = w.N;
  at::Tensor y = at::empty(shape, x.options());
  if (R == 0) return y;
  const float* in = x.const_data_ptr<float>();
  float* out = y.data_ptr<float>();
  Input prepared(w, R);
  const Division parts(w, R, w.panels(), threads());
#pragma omp parallel
  {
    if (prepared.needs_preparation()) {
#pragma omp for
      for (int64_t r = 0; r < R; ++r) prepared.prepare(in + r * w.K, r, floats(most));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < parts.size; ++i)
      product<1>(w, floats(bias), prepared.rows(in), parts, i, 0,
                 [&](int64_t panel, int64_t first, int64_t rows, const float* sums) {
                   const int64_t outputs = std::min(PANEL, w.N - panel * PANEL);
                   for (int64_t r = 0; r < rows; ++r)
                     std::memcpy(out + (first + r) * w.N + panel * PANEL, sums + r * PANEL, outputs * sizeof(float));
                 });
  }
  return y;
}

// Lesson 1's `rms_norm` of one row.
inline void norm(const float* x, const float* weight, int64_t size, float eps, float* out) {
  vec squares = {};
  int64_t k = 0;
  for (; k + LANES <= size; k += LANES) squares += load<vec>(x + k) * load<vec>(x + k);
  float sum = total(squares);
  for (; k < size; ++k) sum += x[k] * x[k];
  const float scale = 1 / std::sqrt(sum / size + eps);
  for (k = 0; k < size; ++k) out[k] = x[k] * scale * weight[k];
}

// Lesson 1's `apply_rotary` of one head, in place. cos, sin: (half).
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[d + half];
    x[d] = a * cos[d] - b * sin[d];
    x[d + half] = b * cos[d] + a * sin[d];
  }
}

// Writes the sums of `o_proj` or `down_proj`, (rows, 16), plus the residual if there is one, to out, (T, N).
struct Residual {
  const float* residual;  // nullptr: nothing is added here
  float* out;
  int64_t N;

  void operator()(int64_t panel, int64_t first, int64_t rows, const float* sums) const {
    const int64_t outputs = std::min(PANEL, N - panel * PANEL);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first + r) * N + panel * PANEL;
      for (int64_t i = 0; i < outputs; ++i) out[at + i] = sums[r * PANEL + i] + (residual ? residual[at + i] : 0);
    }
  }
};

// A batch, and the blocks that its layers write and read: keys and values (layers, blocks, block_size, kv_heads, head_dim).
// slots: (T). layout: of R requests query_start (R + 1), context_lens (R), the start of each table (R), and all tables, one
// after another.
struct Paged : torch::CustomClassHolder {
  at::Tensor keys, values, slots, layout;
  int64_t requests;

  Paged(at::Tensor keys, at::Tensor values, at::Tensor slots, at::Tensor layout, int64_t requests)
      : keys(std::move(keys)), values(std::move(values)), slots(std::move(slots)), layout(std::move(layout)),
        requests(requests) {}
};

struct Layer : torch::CustomClassHolder {
  at::Tensor norm_weight;
  double eps;
  c10::intrusive_ptr<Linear> first, second;  // qkv_proj and o_proj, or gate_up_proj and down_proj
  std::optional<at::Tensor> first_bias, second_bias;

  Layer(at::Tensor weight, double eps, c10::intrusive_ptr<Linear> first, std::optional<at::Tensor> first_bias,
        c10::intrusive_ptr<Linear> second, std::optional<at::Tensor> second_bias)
      : norm_weight(std::move(weight)), eps(eps), first(std::move(first)), second(std::move(second)),
        first_bias(std::move(first_bias)), second_bias(std::move(second_bias)) {}
};

// The first half of a decoder layer: norm, q, k and v, QK norm, rotation, into the blocks, attention, output projection.
struct AttentionLayer : Layer {
  int64_t heads, kv_heads, head_dim, window;  // window: the largest number where there is none
  std::optional<at::Tensor> qk_norm;          // (heads + kv_heads, head_dim), where there is one
  double qk_eps;

  AttentionLayer(at::Tensor weight, double eps, c10::intrusive_ptr<Linear> qkv, std::optional<at::Tensor> qkv_bias,
                 c10::intrusive_ptr<Linear> o, std::optional<at::Tensor> o_bias, int64_t heads, int64_t kv_heads,
                 int64_t head_dim, int64_t window, std::optional<at::Tensor> qk_norm, double qk_eps)
      : Layer(std::move(weight), eps, std::move(qkv), std::move(qkv_bias), std::move(o), std::move(o_bias)),
        heads(heads), kv_heads(kv_heads), head_dim(head_dim), window(window), qk_norm(std::move(qk_norm)),
        qk_eps(qk_eps) {}

  // given: (T, hidden_size); cos, sin: (T, head_dim / 2); layer: its number in the blocks. Returns (T, hidden_size): hidden
  // plus the layer's output, or the output alone. Number: of the blocks, a float or a bfloat16.
  template <typename Number>
  at::Tensor compute(const at::Tensor& given, const at::Tensor& cos, const at::Tensor& sin, const Paged& batch,
                     int64_t layer, bool add_hidden) {
    const at::Tensor hidden = given.contiguous();
    const int64_t requests = batch.requests, before_layer = layer * batch.keys.stride(0);
    const Linear &qkv = *first, &o = *second;
    const int64_t T = hidden.size(0), H = qkv.K, width = qkv.N, half = head_dim / 2, rotated = heads + kv_heads;
    const int64_t group = heads / kv_heads, mixed_width = heads * head_dim;
    const float *x = hidden.const_data_ptr<float>(), *weight = norm_weight.const_data_ptr<float>();
    const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    const Blocks<Number> blocks{static_cast<Number*>(batch.keys.data_ptr()) + before_layer,
                                static_cast<Number*>(batch.values.data_ptr()) + before_layer, batch.keys.size(2), kv_heads,
                                head_dim};
    const int64_t *slot = batch.slots.const_data_ptr<int64_t>(), *start = batch.layout.const_data_ptr<int64_t>();
    const int64_t *context = start + requests + 1, *table = context + requests;
    at::Tensor result = at::empty_like(hidden);
    const Floats normed(T * H), projected(T * width), mixed(T * mixed_width);
    Input before(qkv, T), after(o, T);
    std::vector<std::array<int64_t, 3>> items;  // request, key/value head, first token
    for (int64_t r = 0; r < requests; ++r)
      for (int64_t t = start[r]; t < start[r + 1]; t += QUERIES)
        for (int64_t head = 0; head < kv_heads; ++head) items.push_back({r, head, t});
    std::reverse(items.begin(), items.end());  // a prompt's longest contexts first: no thread waits for a long last one
    const int64_t num_items = items.size();
    const Division parts(qkv, T, qkv.panels(), threads()), out_parts(o, T, o.panels(), threads());
    const Residual finish{add_hidden ? x : nullptr, result.data_ptr<float>(), o.N};
#pragma omp parallel
    {
#pragma omp for
      for (int64_t t = 0; t < T; ++t) {
        norm(x + t * H, weight, H, eps, &normed[t * H]);
        before.prepare(&normed[t * H], t);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < parts.size; ++i)
        product<1>(qkv, floats(first_bias), before.rows(normed.data()), parts, i, 0,
                   Residual{nullptr, projected.data(), width});
#pragma omp for
      for (int64_t t = 0; t < T; ++t) {
        float* row = &projected[t * width];
        for (int64_t h = 0; h < rotated; ++h) {
          float* head = row + h * head_dim;
          if (qk_norm) norm(head, floats(qk_norm) + h * head_dim, head_dim, qk_eps, head);
          rotate(head, c + t * half, s + t * half, half);
        }
        const int64_t size = kv_heads * head_dim, at = slot[t] * size;
        round_to(blocks.keys + at, row + mixed_width, size);
        round_to(blocks.values + at, row + mixed_width + size, size);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_items; ++i) {
        const auto [r, head, t] = items[i];
        const int64_t tokens = std::min(QUERIES, start[r + 1] - t), offset = head * group * head_dim;
        attend(&projected[t * width + offset], width, tokens, group, context[r] - (start[r + 1] - t), window, blocks,
               start + table[r], head, &mixed[t * mixed_width + offset], mixed_width);
      }
      if (after.needs_preparation()) {
#pragma omp for
        for (int64_t t = 0; t < T; ++t) after.prepare(&mixed[t * mixed_width], t);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < out_parts.size; ++i)
        product<1>(o, floats(second_bias), after.rows(mixed.data()), out_parts, i, 0, finish);
    }
    return result;
  }

  at::Tensor forward(const at::Tensor& hidden, const at::Tensor& cos, const at::Tensor& sin,
                     const c10::intrusive_ptr<Paged>& batch, int64_t layer, bool add_hidden) {
    const bool has_floats = batch->keys.scalar_type() == at::kFloat;
    const auto run = has_floats ? &AttentionLayer::compute<float> : &AttentionLayer::compute<uint16_t>;
    return (this->*run)(hidden, cos, sin, *batch, layer, add_hidden);
  }
};

// The second half: norm, gate and up, SiLU, down. gate_up_proj has gate's panels, then as many of up.
struct MLPLayer : Layer {
  using Layer::Layer;

  // given: (T, hidden_size). Returns (T, hidden_size): hidden plus the layer's output, or the output alone.
  at::Tensor forward(const at::Tensor& given, bool add_hidden) {
    const at::Tensor hidden = given.contiguous();
    const Linear &gate_up = *first, &down = *second;
    const int64_t T = hidden.size(0), H = gate_up.K, inner = down.K, panels = gate_up.panels() / 2;
    const Division parts(gate_up, T, panels, threads()), out_parts(down, T, down.panels(), threads());
    const float *x = hidden.const_data_ptr<float>(), *weight = norm_weight.const_data_ptr<float>();
    at::Tensor result = at::empty_like(hidden);
    const Floats normed(T * H), active(T * inner);
    Input before(gate_up, T), after(down, T);
    const Residual finish{add_hidden ? x : nullptr, result.data_ptr<float>(), down.N};
#pragma omp parallel
    {
#pragma omp for
      for (int64_t t = 0; t < T; ++t) {
        norm(x + t * H, weight, H, eps, &normed[t * H]);
        before.prepare(&normed[t * H], t);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < parts.size; ++i)
        product<2>(gate_up, floats(first_bias), before.rows(normed.data()), parts, i, panels,
                   [&](int64_t panel, int64_t row, int64_t rows, const float* gate) {
                     const float* up = gate + CHUNK * PANEL;
                     const int64_t size = std::min(PANEL, inner - panel * PANEL);
                     for (int64_t r = 0; r < rows; ++r, gate += PANEL, up += PANEL) {
                       float out[PANEL];
                       for (int i = 0; i < PANEL; i += LANES) {
                         const vec g = load<vec>(gate + i), u = load<vec>(up + i);
                         store(out + i, g / (1.0f + exponential(g < -87.0f ? 87.0f - vec{} : -g)) * u);
                       }
                       std::memcpy(&active[(row + r) * inner + panel * PANEL], out, size * sizeof(float));
                     }
                   });
      if (after.needs_preparation()) {
#pragma omp for
        for (int64_t t = 0; t < T; ++t) after.prepare(&active[t * inner], t);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < out_parts.size; ++i)
        product<1>(down, floats(second_bias), after.rows(active.data()), out_parts, i, 0, finish);
    }
    return result;
  }
};

// Several layers in one call, for a model on one rank. Between two calls from Python the other threads would fall asleep,
// and waking them takes as long as a small layer.
struct Layers : torch::CustomClassHolder {
  std::vector<c10::intrusive_ptr<AttentionLayer>> attention;
  std::vector<c10::intrusive_ptr<MLPLayer>> mlp;

  void append(c10::intrusive_ptr<AttentionLayer> first, c10::intrusive_ptr<MLPLayer> second) {
    attention.push_back(std::move(first)), mlp.push_back(std::move(second));
  }

  at::Tensor forward(at::Tensor hidden, const at::Tensor& cos, const at::Tensor& sin, const c10::intrusive_ptr<Paged>& batch) {
    for (size_t i = 0; i < mlp.size(); ++i)
      hidden = mlp[i]->forward(attention[i]->forward(hidden, cos, sin, batch, i, true), true);
    return hidden;
  }
};

// The index of the largest score in each row, the first of equal ones, or -1 for a row with a NaN. (R, V) -> (R).
at::Tensor likeliest(const at::Tensor& given) {
  const at::Tensor scores = given.contiguous();
  const int64_t R = scores.size(0), V = scores.size(1);
  at::Tensor found = at::empty({R}, scores.options().dtype(at::kLong));
  const float* all = scores.const_data_ptr<float>();
  int64_t* numbers = found.data_ptr<int64_t>();
#pragma omp parallel for
  for (int64_t r = 0; r < R; ++r) {
    const float* x = all + r * V;
    vec most = x[0] - vec{}, zeros = {};  // zeros: 0, or NaN if there is one
    int64_t i = 0;
    for (; i + LANES <= V; i += LANES) {
      const vec v = load<vec>(x + i);
      most = v > most ? v : most;
      zeros += v != v ? v : vec{};
    }
    float top = largest(most), nan = total(zeros);
    for (; i < V; ++i) top = x[i] > top ? x[i] : top, nan += x[i] != x[i] ? x[i] : 0;
    numbers[r] = nan == nan ? std::find(x, x + V, top) - x : -1;
  }
  return found;
}

}  // namespace inference_course

TORCH_LIBRARY(inference_course, library) {
  using namespace inference_course;
  using Tensor = at::Tensor;
  using Maybe = std::optional<Tensor>;
  using Product = c10::intrusive_ptr<Linear>;
  library.def("has_quads() -> bool", [] { return HAS_QUADS; });
  library.def("has_bfloats() -> bool", [] { return HAS_BFLOATS; });
  library.class_<Linear>("Linear")
      .def(torch::init<int64_t, int64_t, int64_t, Tensor, Maybe, Maybe, int64_t>())
      .def("apply", &apply);
  library.def("likeliest(Tensor scores) -> Tensor", &likeliest);
  library.class_<Paged>("Paged").def(torch::init<Tensor, Tensor, Tensor, Tensor, int64_t>());
  library.class_<AttentionLayer>("AttentionLayer")
      .def(torch::init<Tensor, double, Product, Maybe, Product, Maybe, int64_t, int64_t, int64_t, int64_t, Maybe, double>())
      .def("forward", &AttentionLayer::forward);
  library.class_<MLPLayer>("MLPLayer")
      .def(torch::init<Tensor, double, Product, Maybe, Product, Maybe>())
      .def("forward", &MLPLayer::forward);
  library.class_<Layers>("Layers")
      .def(torch::init<>())
      .def("append", &Layers::append)
      .def("forward", &Layers::forward);
}

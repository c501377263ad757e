// The program's part of the binding: recording, running, and the queue of steps.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "module.h"
#include "program.h"
#include "step_queue.h"

namespace nb = nanobind;

namespace textmill {
namespace {

template <typename T>
T* column(const nb::dict& table, const char* name, int64_t rows, int64_t* width = nullptr) {
  const auto array = nb::cast<Array<T>>(table[name]);
  require(array.ndim() >= 1 && static_cast<int64_t>(array.shape(0)) == rows, "slot table: one row per slot");
  if (width) *width = static_cast<int64_t>(array.size()) / rows;
  return array.data();
}

SlotTable slot_table(const nb::dict& table, const Limits& limits) {
  const int64_t slots = limits.max_slots;
  int64_t token_width = 0;
  SlotTable out;
  out.tokens = column<int32_t>(table, "tokens", slots, &token_width);
  require(token_width == limits.max_total_tokens + 1, "slot table: tokens must be max_total_tokens + 1 wide");
  out.length = column<int32_t>(table, "length", slots);
  out.block_table = column<int32_t>(table, "block_table", slots, &out.blocks_per_slot);
  require(out.blocks_per_slot * limits.block_size >= limits.max_total_tokens, "slot table: too few blocks for a slot");
  out.temperature = column<float>(table, "temperature", slots);
  out.top_p = column<float>(table, "top_p", slots);
  out.typical_p = column<float>(table, "typical_p", slots);
  out.repetition_penalty = column<float>(table, "repetition_penalty", slots);
  out.frequency_penalty = column<float>(table, "frequency_penalty", slots);
  out.top_k = column<int32_t>(table, "top_k", slots);
  out.draws = column<uint8_t>(table, "draws", slots);
  out.seed = column<uint64_t>(table, "seed", slots);
  out.top_n = column<int32_t>(table, "top_n", slots);
  out.prompt_logprobs = column<uint8_t>(table, "prompt_logprobs", slots);
  return out;
}

// A program, with the Python memory it points into kept alive.
class PyProgram {
 public:
  PyProgram(int64_t max_rows, int64_t max_outputs, int64_t max_slots, int64_t max_total_tokens, int64_t block_size,
            int64_t vocab_size, bool half_cache, nb::dict table)
      : limits_{max_rows, max_outputs, max_slots, max_total_tokens, block_size, vocab_size, half_cache},
        program_(limits_, slot_table(table, limits_)),
        table_(table) {}

  int embed(const Matrix& matrix, float scale) { return program_.embed(matrix.weight, scale); }
  int place_rows(int x) { return program_.place_rows(x); }
  int rms_norm(int x, const Floats& weight, float eps) {
    return program_.rms_norm(x, keep(weight), static_cast<int64_t>(weight.size()), eps);
  }
  int layer_norm(int x, const Floats& weight, const std::optional<Floats>& bias, float eps) {
    require(!bias || bias->size() == weight.size(), "layer_norm: the bias is not as wide as the weight");
    return program_.layer_norm(x, keep(weight), static_cast<int64_t>(weight.size()), keep(bias), eps);
  }
  int embed_positions(const Array<const float, nb::ndim<2>>& table, int64_t offset) {
    return program_.embed_positions(keep(Floats(table)), static_cast<int64_t>(table.shape(0)),
                                    static_cast<int64_t>(table.shape(1)), offset);
  }
  int add(int x, int y) { return program_.binary(OpKind::kAdd, x, y); }
  int multiply(int x, int y) { return program_.binary(OpKind::kMultiply, x, y); }
  int clip(int x, float limit) { return program_.unary(OpKind::kClip, x, limit); }
  int scale(int x, float factor) { return program_.unary(OpKind::kScale, x, factor); }
  int softcap(int x, float cap) { return program_.unary(OpKind::kSoftcap, x, cap); }
  int activation(int x, int number) { return program_.activation(x, kind_of(number), false); }
  int gated_activation(int x, int number) { return program_.activation(x, kind_of(number), true); }
  int matmul(int x, const Matrix& matrix, const std::optional<Floats>& bias, int number, bool gated) {
    require(!bias || static_cast<int64_t>(bias->size()) == matrix.weight->n, "matmul: one bias per output");
    return program_.matmul(x, matrix.weight, keep(bias), kind_of(number), gated);
  }

  int attend(int x, int layer, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window,
             float softcap, const std::optional<Floats>& alibi, const std::optional<Floats>& rope_cos,
             const std::optional<Floats>& rope_sin, bool rope_interleaved, const std::optional<Floats>& q_norm,
             const std::optional<Floats>& k_norm, const std::optional<Floats>& q_norm_bias,
             const std::optional<Floats>& k_norm_bias, bool norm_centered, float norm_eps) {
    AttentionSpec spec;
    spec.heads = heads;
    spec.kv_heads = kv_heads;
    spec.head_dim = head_dim;
    spec.scale = scale;
    spec.window = window;
    spec.softcap = softcap;
    spec.norm_eps = norm_eps;
    require(!alibi || static_cast<int64_t>(alibi->size()) == heads, "attend: one ALiBi slope per head");
    spec.alibi = keep(alibi);
    require(rope_cos.has_value() == rope_sin.has_value(), "attend: cos and sin come together");
    if (rope_cos) {
      require(rope_cos->ndim() == 2 && rope_sin->ndim() == 2 && rope_cos->size() == rope_sin->size() &&
                  rope_cos->shape(1) == rope_sin->shape(1),
              "attend: cos and sin must be [positions, rotary_dim / 2]");
      require(static_cast<int64_t>(rope_cos->shape(0)) >= limits_.max_total_tokens,
              "attend: the rotary tables have fewer positions than max_total_tokens");
      spec.rotary_half = static_cast<int64_t>(rope_cos->shape(1));
    }
    spec.rope_cos = keep(rope_cos);
    spec.rope_sin = keep(rope_sin);
    spec.rope_interleaved = rope_interleaved;
    spec.q_norm = head_norm(q_norm, q_norm_bias, heads, head_dim, norm_centered);
    spec.k_norm = head_norm(k_norm, k_norm_bias, kv_heads, head_dim, norm_centered);
    return program_.attend(x, layer, spec);
  }

  int experts(int x, int scores, const nb::list& gate_up, const nb::list& down, int64_t top_k, float norm, int number) {
    Experts spec;
    for (nb::handle one : gate_up) spec.gate_up.push_back(nb::cast<const Matrix&>(one).weight);
    for (nb::handle one : down) spec.down.push_back(nb::cast<const Matrix&>(one).weight);
    spec.top_k = top_k;
    spec.norm = norm;
    spec.activation = kind_of(number);
    return program_.experts(x, scores, std::move(spec));
  }

  int convolve(int x, const Array<const float, nb::ndim<2>>& weight, const std::optional<Floats>& bias) {
    require(!bias || bias->size() == weight.shape(1), "convolve: one bias per channel");
    return program_.convolve(x, keep(Floats(weight)), static_cast<int64_t>(weight.shape(0)),
                             static_cast<int64_t>(weight.shape(1)), keep(bias));
  }
  int scan(int x, int step, int bc, int gate, const Array<const float, nb::ndim<2>>& a, const Floats& skip) {
    require(skip.size() == a.shape(1), "scan: one skip per channel");
    return program_.scan(x, step, bc, gate, keep(Floats(a)), static_cast<int64_t>(a.shape(0)),
                         static_cast<int64_t>(a.shape(1)), keep(skip));
  }

  int outputs(int x) { return program_.outputs(x); }
  void finish(int logits) { program_.finish(logits); }
  int64_t columns(int index) const { return program_.columns(index); }
  size_t kv_bytes_per_block() const { return program_.kv_bytes_per_block(); }
  size_t arena_bytes() const { return program_.arena_bytes(); }
  void allocate(int64_t num_blocks) { program_.allocate(num_blocks); }
  bool profiling() const { return program_.profiling; }
  void set_profiling(bool enabled) { program_.profiling = enabled; }
  void reset_profile() { program_.reset_profile(); }

  std::vector<std::tuple<std::string, int64_t, double, int64_t, int64_t>> profile() const {
    std::vector<std::tuple<std::string, int64_t, double, int64_t, int64_t>> out;
    for (const OpProfile& e : program_.profile()) out.emplace_back(e.name, e.calls, e.seconds, e.bytes, e.macs);
    return out;
  }

  void run(Array<const int32_t, nb::ndim<2>> work, Array<int32_t, nb::ndim<1>> token, Array<float, nb::ndim<1>> logprob,
           Array<uint8_t, nb::ndim<1>> error, Array<int32_t, nb::ndim<1>> top_count,
           Array<int32_t, nb::ndim<2>> top_ids, Array<float, nb::ndim<2>> top_logprobs,
           Array<float, nb::ndim<1>> prompt_logprobs, std::optional<Array<float, nb::ndim<2>>> logits, bool sample,
           bool every_row, std::optional<Array<const int32_t, nb::ndim<1>>> placed_row,
           std::optional<Array<const float, nb::ndim<2>>> placed) {
    const StepOutput out = output_of(work, token, logprob, error, top_count, top_ids, top_logprobs, prompt_logprobs,
                                     logits, sample, every_row);
    require(placed_row.has_value() == placed.has_value(), "run: placed rows and which they are come together");
    PlacedRows given;
    if (placed) {
      given = {placed_row->data(), static_cast<int64_t>(placed_row->size()), placed->data(),
               static_cast<int64_t>(placed->shape(0)), static_cast<int64_t>(placed->shape(1))};
    }
    nb::gil_scoped_release release;
    program_.run(reinterpret_cast<const WorkItem*>(work.data()), static_cast<int64_t>(work.shape(0)), out, given);
  }

  Program& program() { return program_; }
  int64_t slots() const { return limits_.max_slots; }

 private:
  // Where the results of a step go, after a look at the sizes of everything.
  StepOutput output_of(const Array<const int32_t, nb::ndim<2>>& work, const Array<int32_t, nb::ndim<1>>& token,
                       const Array<float, nb::ndim<1>>& logprob, const Array<uint8_t, nb::ndim<1>>& error,
                       const Array<int32_t, nb::ndim<1>>& top_count, const Array<int32_t, nb::ndim<2>>& top_ids,
                       const Array<float, nb::ndim<2>>& top_logprobs, const Array<float, nb::ndim<1>>& prompt_logprobs,
                       const std::optional<Array<float, nb::ndim<2>>>& logits, bool sample, bool every_row) const {
    static_assert(sizeof(WorkItem) == 16);
    require(work.shape(1) == 4, "work must be [n, 4]");
    const auto* items = reinterpret_cast<const WorkItem*>(work.data());
    size_t rows = 0, wanted = 0, places = 0;
    for (size_t i = 0; i < work.shape(0); ++i) {
      const size_t own = static_cast<size_t>(std::max(0, items[i].count));
      const bool known = items[i].slot >= 0 && items[i].slot < limits_.max_slots;
      rows += own;
      places += static_cast<size_t>(items[i].places());
      const size_t sampled = static_cast<size_t>(std::max(0, items[i].samples));
      wanted += known && (every_row || program_.wants_prompt(items[i].slot)) ? own : sampled;
    }
    require(token.size() == places && logprob.size() == places && error.size() == places &&
                top_count.size() == places && top_ids.shape(0) == places && top_logprobs.shape(0) == places &&
                top_ids.shape(1) == top_logprobs.shape(1),
            "run: one result per place of the work");
    require(prompt_logprobs.size() == 0 || prompt_logprobs.size() == rows, "run: one prompt log-probability per row");
    require(!logits || (logits->shape(0) == wanted && static_cast<int64_t>(logits->shape(1)) == limits_.vocab_size),
            "run: logits must be [output rows, vocabulary]");
    return {token.data(), logprob.data(), error.data(), top_count.data(), top_ids.data(), top_logprobs.data(),
            static_cast<int64_t>(top_ids.shape(1)), prompt_logprobs.size() ? prompt_logprobs.data() : nullptr,
            logits ? logits->data() : nullptr, sample, every_row};
  }

  static Activation kind_of(int number) {
    require(number >= 0 && number <= 7, "no such activation");
    return static_cast<Activation>(number);
  }
  const float* keep(const Floats& values) {
    kept_.push_back(values);
    return values.data();
  }
  const float* keep(const std::optional<Floats>& values) { return values ? keep(*values) : nullptr; }
  // A weight [heads, head_dim] norms each head alone; one of the same length in one dimension norms them together.
  HeadNorm head_norm(const std::optional<Floats>& weight, const std::optional<Floats>& bias, int64_t heads,
                     int64_t head_dim, bool centered) {
    HeadNorm norm;
    if (!weight) return norm;
    norm.each = weight->ndim() == 2 || static_cast<int64_t>(weight->size()) != head_dim;
    norm.whole = norm.each && weight->ndim() == 1;
    norm.centered = centered;
    require(!norm.each || static_cast<int64_t>(weight->size()) == heads * head_dim,
            "attend: a norm's weight spans one head or all");
    require(!bias || bias->size() == weight->size(), "attend: a norm's bias is as long as its weight");
    norm.weight = keep(*weight);
    norm.bias = keep(bias);
    return norm;
  }

  Limits limits_;
  Program program_;
  nb::dict table_;
  std::vector<Floats> kept_;
};

// A queue of steps; work and results are plain lists, which cost less than arrays where steps have few rows.
class PyStepQueue {
 public:
  using Work = std::vector<std::tuple<int32_t, int32_t, int32_t, int32_t>>;
  using Top = std::vector<std::pair<int32_t, float>>;

  PyStepQueue(PyProgram& program, Array<uint8_t, nb::ndim<1>> failed, int32_t most_tops)
      : failed_(failed), queue_(program.program(), checked(failed, program.slots()), most_tops) {}

  void submit(const Work& work) {
    std::vector<WorkItem> items;
    items.reserve(work.size());
    for (const auto& [slot, start, count, samples] : work) items.push_back({slot, start, count, samples});
    queue_.submit(std::move(items));
  }

  nb::tuple collect() {
    StepQueue::Ran ran;
    {
      nb::gil_scoped_release release;
      ran = queue_.collect();
    }
    StepResults& results = ran.results;
    return nb::make_tuple(ran.seconds, ran.held, ran.error, results.token, results.logprob, results.error, tops(results),
                          results.prompt_logprobs);
  }

  void go_on() { queue_.go_on(); }

 private:
  static uint8_t* checked(const Array<uint8_t, nb::ndim<1>>& failed, int64_t slots) {
    require(static_cast<int64_t>(failed.size()) == slots, "failed: one entry per slot");
    return failed.data();
  }

  // Of every place, or none if nobody asked.
  static std::vector<Top> tops(const StepResults& results) {
    std::vector<Top> out(results.top_width ? results.token.size() : 0);
    for (size_t place = 0; place < out.size(); ++place) {
      const size_t first = place * static_cast<size_t>(results.top_width);
      for (size_t i = first; i < first + static_cast<size_t>(results.top_count[place]); ++i) {
        out[place].emplace_back(results.top_ids[i], results.top_logprobs[i]);
      }
    }
    return out;
  }

  Array<uint8_t, nb::ndim<1>> failed_;
  StepQueue queue_;
};

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<PyProgram>(m, "Program")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, nb::dict>())
      .def("embed", &PyProgram::embed)
      .def("place_rows", &PyProgram::place_rows)
      .def("rms_norm", &PyProgram::rms_norm)
      .def("layer_norm", &PyProgram::layer_norm, nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
      .def("embed_positions", &PyProgram::embed_positions)
      .def("add", &PyProgram::add)
      .def("multiply", &PyProgram::multiply)
      .def("clip", &PyProgram::clip)
      .def("scale", &PyProgram::scale)
      .def("softcap", &PyProgram::softcap)
      .def("activation", &PyProgram::activation)
      .def("gated_activation", &PyProgram::gated_activation)
      .def("matmul", &PyProgram::matmul, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg())
      .def("attend", &PyProgram::attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg().none(),
           nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg())
      .def("experts", &PyProgram::experts)
      .def("convolve", &PyProgram::convolve, nb::arg(), nb::arg(), nb::arg().none())
      .def("scan", &PyProgram::scan)
      .def("outputs", &PyProgram::outputs)
      .def("finish", &PyProgram::finish)
      .def("columns", &PyProgram::columns)
      .def_prop_ro("kv_bytes_per_block", &PyProgram::kv_bytes_per_block)
      .def_prop_ro("arena_bytes", &PyProgram::arena_bytes)
      .def("allocate", &PyProgram::allocate)
      .def("run", &PyProgram::run, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg().none() = nb::none(),
           nb::arg().none() = nb::none())
      .def_prop_rw("profiling", &PyProgram::profiling, &PyProgram::set_profiling)
      .def("profile", &PyProgram::profile)
      .def("reset_profile", &PyProgram::reset_profile);
  nb::class_<PyStepQueue>(m, "StepQueue")
      .def(nb::init<PyProgram&, Array<uint8_t, nb::ndim<1>>, int32_t>(), nb::keep_alive<1, 2>())
      .def("submit", &PyStepQueue::submit)
      .def("collect", &PyStepQueue::collect)
      .def("go_on", &PyStepQueue::go_on);
}

}  // namespace textmill

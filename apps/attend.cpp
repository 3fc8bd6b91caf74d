// vesper attend: one attention step on tensors from a file, for checking a backend against anybody's reference.
#include <memory>
#include <vector>

#include "apps/options.h"
#include "engine/attend_step.h"
#include "engine/core/error.h"
#include "models/safetensors.h"

namespace vesper {
namespace {

struct AttendOptions {
  ModelOptions model;  // of these: device, attention, page_tokens, seed
  std::string input;
  std::string output;
  int repeat = 1;
};

TensorRef input_tensor(const SafetensorsFile& file, const std::string& name) {
  const StoredTensor* stored = file.find(name);
  if (stored == nullptr) {
    refuse({"reading " + file.path(), "no tensor \"" + name + "\"", "the tensors q, k and v", ""});
  }
  if (stored->shape.empty() || stored->shape.size() > 4) {
    refuse({"reading " + file.path(), "tensor \"" + name + "\" of rank " + std::to_string(stored->shape.size()),
            "q [heads, head_dim], k and v [tokens, kv_heads, head_dim]", ""});
  }
  TensorRef tensor;
  tensor.data = const_cast<std::byte*>(stored->data);  // attend_step only reads it
  tensor.dtype = stored->dtype;
  tensor.rank = static_cast<int>(stored->shape.size());
  std::copy(stored->shape.begin(), stored->shape.end(), tensor.shape.begin());
  return tensor;
}

void append(std::vector<float>& all, const std::vector<float>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

int run_attend(const CLI::App& app, const AttendOptions& options) {
  check_output_path(options.output);
  const DeviceKind device = choose_device(options.model.device);
  const SafetensorsFile file(options.input);
  const AttendInput input{.source = options.input,
                          .q = input_tensor(file, "q"),
                          .k = input_tensor(file, "k"),
                          .v = input_tensor(file, "v")};

  std::vector<AttendOutput> runs;
  runs.reserve(static_cast<std::size_t>(options.repeat));
  for (int i = 0; i < options.repeat; ++i) {
    runs.push_back(attend_step(input, options.model.attention, options.model.page_tokens,
                               options.model.seed + static_cast<std::uint32_t>(i), device));
  }
  // Lists of different runs may differ in length; all are padded to the longest.
  int columns = 0;
  for (const AttendOutput& run : runs) columns = std::max(columns, run.index_columns);
  AttendOutput all;
  for (const AttendOutput& run : runs) {
    append(all.out, run.out);
    append(all.lse, run.lse);
    all.count.insert(all.count.end(), run.count.begin(), run.count.end());
    all.tail_begin.insert(all.tail_begin.end(), run.tail_begin.begin(), run.tail_begin.end());
    for (std::size_t g = 0; g < run.count.size(); ++g) {
      const auto row = run.index.begin() + static_cast<std::ptrdiff_t>(g) * run.index_columns;
      all.index.insert(all.index.end(), row, row + run.index_columns);
      all.index.insert(all.index.end(), static_cast<std::size_t>(columns - run.index_columns), -1);
    }
  }
  const std::int64_t heads = input.q.shape[0];
  const std::int64_t kv_heads = input.k.shape[1];
  const auto shaped = [&](std::vector<std::int64_t> shape) {
    if (app.count("--repeat") > 0) shape.insert(shape.begin(), options.repeat);
    return shape;
  };
  const std::vector<NamedTensor> tensors = {
      {"out", DType::kF32, shaped({heads, input.q.shape[1]}), all.out.data()},
      {"lse", DType::kF32, shaped({heads}), all.lse.data()},
      {"count", DType::kI32, shaped({kv_heads}), all.count.data()},
      {"index", DType::kI32, shaped({kv_heads, columns}), all.index.data()},
      {"tail_begin", DType::kI32, shaped({kv_heads}), all.tail_begin.data()},
  };
  write_safetensors(options.output, tensors);
  return 0;
}

}  // namespace

Command make_attend(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "attend",
      "One attention step on tensors from a safetensors file, to check a backend against a reference. Tells which keys "
      "it attended to.");
  app->footer(
      "Reads, in f32, bf16 or f16, keys already rotated:\n"
      "  q           [heads, head_dim]\n"
      "  k, v        [tokens, kv_heads, head_dim]\n"
      "Writes:\n"
      "  out         [heads, head_dim] f32\n"
      "  lse         [heads] f32              natural log of the sum of e^s\n"
      "  count       [kv_heads] i32           keys on the list\n"
      "  index       [kv_heads, most] i32     their token numbers, padded with -1\n"
      "  tail_begin  [kv_heads] i32           where randomly drawn keys begin\n\n"
      "Example:\n"
      "  vesper attend --input qkv.safetensors --attention dense --output out.safetensors");
  auto options = std::make_shared<AttendOptions>();
  app->add_option("--input", options->input, "The safetensors file with q, k and v")
      ->required()
      ->check(some_text())
      ->type_name("FILE")
      ->group(kInputFlags);
  app->add_option("--output", options->output, "The safetensors file to write")
      ->required()
      ->type_name("FILE")
      ->group(kOutputFlags);
  add_device_flags(*app, options->model);
  app->get_option("--attention")
      ->description(
          "What the step attends with, as a layer of its own: dense, quest, twilight or vattention, with settings as "
          "in "
          "quest:token_budget=1024, or a .json file with a rule for one layer");
  add_seed_flag(*app, options->model, "Of random draws; dense attention has none", kRunFlags);
  app->add_option("--repeat", options->repeat, "Run seeds seed ... seed + N - 1 and stack every output on a first axis")
      ->check(whole_number(1, 1 << 20))
      ->type_name("N")
      ->group(kRunFlags);
  return Command{app, [app, options] { return run_attend(*app, *options); }};
}

}  // namespace vesper

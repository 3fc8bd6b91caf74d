// Wrong input, through the binary: one sentence on stderr that names what was wrong and what to do, exit code 2,
// nothing on stdout, no file left behind.
#include <unistd.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "engine/core/stream.h"
#include "tests/apps/run_vesper.h"
#include "tests/models/tiny_checkpoint.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

std::set<std::string> entries_of(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

// A sound model folder, to be spoiled.
class BadModel : public testing::Test {
 protected:
  void SetUp() override {
    write_config({});
    checkpoint_.write_single(folder_);
  }

  // The tiny checkpoint's config.json with some keys changed.
  void write_config(const Json& changes) const {
    const ModelConfig& config = checkpoint_.config;
    Json document = {{"architectures", {"LlamaForCausalLM"}},  {"num_hidden_layers", config.layers},
                     {"hidden_size", config.hidden},           {"num_attention_heads", config.heads},
                     {"num_key_value_heads", config.kv_heads}, {"head_dim", config.head_dim},
                     {"intermediate_size", config.ffn},        {"vocab_size", config.vocab}};
    document.update(changes.is_null() ? Json::object() : changes);
    write_file(folder_ / "config.json", document.dump());
  }

  // Changes the header of model.safetensors; the tensors' bytes stay as they are.
  void spoil_header(const std::function<void(Json& header)>& spoil) const {
    const std::string bytes = read_file(weights_);
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    Json header = Json::parse(bytes.substr(sizeof(length), length));
    spoil(header);
    write_file(weights_, safetensors_bytes(header.dump(), 0) + bytes.substr(sizeof(length) + length));
  }

  // What `vesper logits` says of the folder; it must leave the folder as it was.
  [[nodiscard]] std::string refusal_of_model() const {
    const std::set<std::string> before = entries_of(folder_.path());
    const std::string message = refused({"logits", "--model", folder_.path(), "--device", "cpu", "--ids", "1 2",
                                         "--output", folder_ / "logits.safetensors"});
    EXPECT_EQ(entries_of(folder_.path()), before) << message;
    return message;
  }

  TempFolder folder_;
  TinyCheckpoint checkpoint_{TinyCheckpoint::shape(), DType::kF32};
  std::string weights_ = folder_ / "model.safetensors";
};

constexpr const char* kQ = "model.layers.1.self_attn.q_proj.weight";

TEST_F(BadModel, IsSoundBeforeItIsSpoiled) {
  (void)run_well({"logits", "--model", folder_.path(), "--device", "cpu", "--ids", "1 2", "--output",
                  folder_ / "logits.safetensors"});
}

TEST_F(BadModel, TruncatedOrPaddedWeights) {
  const std::string sound = read_file(weights_);
  write_file(weights_, sound.substr(0, sound.size() - 1));
  expect_names(refusal_of_model(), {weights_, "truncated"});
  write_file(weights_, sound + '\0');
  expect_names(refusal_of_model(), {weights_, "padded"});
  write_file(weights_, sound.substr(0, 5));
  expect_names(refusal_of_model(), {weights_});
  write_file(weights_, "");
  expect_names(refusal_of_model(), {weights_});
}

TEST_F(BadModel, OverlappingAndOverflowingOffsets) {
  spoil_header([](Json& header) {
    header[kQ]["data_offsets"] = header["lm_head.weight"]["data_offsets"];
    header[kQ]["shape"] = header["lm_head.weight"]["shape"];
  });
  expect_names(refusal_of_model(), {weights_, "expected"});
  checkpoint_.write_single(folder_);
  spoil_header([](Json& header) { header[kQ]["data_offsets"][1] = UINT64_MAX; });
  expect_names(refusal_of_model(), {weights_, kQ});
  checkpoint_.write_single(folder_);
  spoil_header([](Json& header) { header[kQ]["shape"] = {INT64_MAX, INT64_MAX}; });
  expect_names(refusal_of_model(), {weights_, kQ, "9223372036854775807"});
}

TEST_F(BadModel, WrongAndUnknownTypes) {
  spoil_header([](Json& header) { header[kQ]["dtype"] = "I32"; });
  expect_names(refusal_of_model(), {kQ, "i32", "f32, bf16 or f16"});
  checkpoint_.write_single(folder_);
  spoil_header([](Json& header) { header[kQ]["dtype"] = "F8_E4M3"; });
  expect_names(refusal_of_model(), {weights_, kQ, "F8_E4M3"});
}

TEST_F(BadModel, MissingTensorsAndShapesAgainstTheConfig) {
  std::vector<std::string> names = checkpoint_.names();
  std::erase(names, kQ);
  checkpoint_.write(weights_, names);
  expect_names(refusal_of_model(), {folder_.path(), kQ, "config.json"});
  checkpoint_.write_single(folder_);
  write_config({{"intermediate_size", 41}});
  expect_names(refusal_of_model(), {"mlp", "config.json", "ffn"});
  write_config({{"num_hidden_layers", 3}});
  expect_names(refusal_of_model(), {"model.layers.2", "config.json"});
}

TEST_F(BadModel, JsonThatIsHostile) {
  const std::string config = folder_ / "config.json";
  write_file(config, R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 24, "hidden_size": 24})");
  expect_names(refusal_of_model(), {config, "\"hidden_size\" twice"});
  write_file(config, std::string(10000, '[') + std::string(10000, ']'));
  expect_names(refusal_of_model(), {config, "deeper than"});
  write_file(config, "{\"hidden_size\": \"\xFF\"}");
  expect_names(refusal_of_model(), {config, "UTF-8"});
  write_config({});
  const std::string deep = "{\"x\":" + std::string(10000, '[') + std::string(10000, ']') + "}";
  write_file(weights_, safetensors_bytes(deep, 0));
  expect_names(refusal_of_model(), {weights_, "deeper than"});
  write_file(weights_, safetensors_bytes(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                                         R"("x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                                         4));
  expect_names(refusal_of_model(), {weights_, "\"x\" twice"});
}

TEST_F(BadModel, AnIndexThatNamesAMissingShardOrAPath) {
  std::filesystem::remove(weights_);
  Json index = checkpoint_.write_shards(folder_);
  const std::string index_path = folder_ / "model.safetensors.index.json";
  std::filesystem::remove(folder_ / "model-2.safetensors");
  expect_names(refusal_of_model(), {index_path, "model-2.safetensors", "not in the folder"});
  index["weight_map"][kQ] = "../model-2.safetensors";
  TinyCheckpoint::write_index(folder_, index);
  expect_names(refusal_of_model(), {index_path, kQ, "../model-2.safetensors", "without path parts"});
}

TEST_F(BadModel, HeadsThatDoNotDivideAndWhatIsNotSupported) {
  const std::string config = folder_ / "config.json";
  write_config({{"num_key_value_heads", 3}});
  expect_names(refusal_of_model(), {config, "num_key_value_heads", "4", "3"});
  write_config({{"rope_scaling", {{"rope_type", "longrope"}}}});
  expect_names(refusal_of_model(), {config, "rope_scaling", "longrope", "default, linear, dynamic, llama3, yarn"});
  write_config({{"architectures", {"MixtralForCausalLM"}}});
  expect_names(refusal_of_model(), {config, "MixtralForCausalLM", "LlamaForCausalLM"});
}

TEST_F(BadModel, AFolderWithoutAllOfAModel) {
  expect_names(refused({"generate", "--model", folder_.path(), "--prompt", "x"}), {folder_.path(), "tokenizer.model"});
  expect_names(refused({"tokenize", "--model", folder_.path(), "--text", "x"}), {folder_.path(), "tokenizer.model"});
  write_file(folder_ / "tokenizer.model", "no model");
  expect_names(refused({"tokenize", "--model", folder_.path(), "--text", "x"}), {folder_ / "tokenizer.model"});
  std::filesystem::rename(weights_, folder_ / "pytorch_model.bin");
  expect_names(refusal_of_model(), {folder_.path(), "PyTorch", "save_pretrained"});
  std::filesystem::remove(folder_ / "config.json");
  expect_names(refusal_of_model(), {folder_.path(), "config.json"});
  expect_names(refused({"info", "--model", folder_ / "none"}), {folder_ / "none", "no such folder"});
  expect_names(refused({"info", "--model", "synthetic:none"}), {"\"none\"", "llama-3.1-8b", "tiny"});
}

std::vector<std::string> on_demo(const std::string& command, const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {command, "--model", demo_model(), "--device", "cpu"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

TEST(BadRequest, AnUnusableCommandLine) {
  const auto lists_commands = [](const std::vector<std::string>& arguments, const std::string& found) {
    expect_names(refused(arguments), {found, "generate, chat, tokenize, logits, attend, info"});
  };
  lists_commands({}, "found nothing");
  lists_commands({"generte"}, "\"generte\"");
  lists_commands({"--nope"}, "\"--nope\"");
  expect_names(refused({"--device", "cpu", "info"}), {"\"--device\"", "vesper info and then its flags"});
  expect_names(refused(on_demo("generate", {"--prmpt", "x"})),
               {"vesper generate", "\"--prmpt\"", "--prompt, --prompt-file, --prompts-jsonl", "--log-level"});
  expect_names(refused({"tokenize", "--model", demo_model(), "--json"}),
               {"\"--json\"", "--text, --file, --jsonl, --decode"});
  expect_names(refused(on_demo("generate", {"--stop", "a", "b"})), {"\"b\""});
  expect_names(refused({"generate"}), {"no --model", "--model DIR", "`vesper generate --help`"});
  expect_names(refused({"info", "--modle", "x"}), {"\"--modle\"", "--model, "});
  expect_names(refused({"logits", "--model", demo_model(), "--ids", "1"}), {"no --output", "--output FILE"});
  expect_names(refused({"generate", "--model"}), {"--model without a value"});
  expect_names(refused(on_demo("generate", {"--prompt", "a", "--prompt", "b"})), {"--prompt twice"});
  expect_names(refused(on_demo("generate", {"--prompt", "a", "--ids", "1"})), {"--prompt together with --ids"});
  expect_names(refused(on_demo("generate", {"--ids", "1", "--stop", "x"})), {"--stop", "together with", "--ids"});
  expect_names(refused({"tokenize", "--model", demo_model(), "--decode", "1", "--bos"}), {"--bos"});
}

TEST(BadRequest, ValuesOutOfRange) {
  const auto check = [](const std::string& flag, const std::string& value, const std::string& expected) {
    expect_names(refused(on_demo("generate", {"--prompt", "a", flag, value})),
                 {"reading " + flag + ":", '"' + value + '"', expected});
  };
  check("--max-tokens", "0", "from 1 to 16777216");
  check("--max-tokens", "5x", "a whole number");
  check("--max-tokens", "010", "a whole number");
  check("--max-context", "99999999999999999999", "from 1 to");
  check("--prefill-chunk", "-1", "from 1 to 65536");
  check("--page-tokens", "20", "16, 32, 64");
  check("--seed", "-1", "from 0 to 4294967295");
  check("--temperature", "nan", "a number from 0 to 100");
  check("--temperature", "-0.5", "a number from 0 to 100");
  check("--top-p", "0", "to 1");
  check("--top-p", "1.1", "to 1");
  check("--top-k", "1.5", "a whole number");
  check("--decode-last", "", "a whole number");
  check("--device", "tpu", "auto, cpu, cuda");
  check("--log-level", "loud", "debug, info, warn, error, off");
  expect_names(refused(on_demo("generate", {"--prompt", "a", "--stop", ""})), {"reading --stop", "empty"});
  for (const std::string threads : {"0", "x", "4x", ""}) {
    expect_names(refused(on_demo("generate", {"--prompt", "a"}), {.environment = {{"VESPER_THREADS", threads}}}),
                 {"VESPER_THREADS", '"' + threads + '"', "1 to 1024"});
  }
}

TEST(BadRequest, PromptsThatAreNoPrompts) {
  const TempFolder folder;
  const std::string path = folder / "prompts";
  expect_names(refused(on_demo("generate", {"--prompt", "a\xFFz"})), {"--prompt", "0xff", "offset 1", "UTF-8"});
  expect_names(refused(on_demo("generate", {}), {.input = "ab\xC3"}), {"stdin", "offset 2"});
  write_file(path, "abc\xF0\x9F");
  expect_names(refused(on_demo("generate", {"--prompt-file", path})), {path, "offset 3"});
  expect_names(refused({"tokenize", "--model", demo_model(), "--file", path}), {path, "offset 3"});
  expect_names(refused({"tokenize", "--model", demo_model(), "--text", "\xED\xA0\x80"}), {"--text", "offset 0"});
  expect_names(refused(on_demo("generate", {"--prompt-file", folder / "none"})), {folder / "none", "No such file"});
  expect_names(refused(on_demo("generate", {"--prompt-file", folder.path()})), {folder.path(), "directory"});
  expect_names(refused(on_demo("generate", {"--prompt-file", "/dev/zero"})), {"/dev/zero", "256 MiB"});

  const auto refusal_of_lines = [&](const std::string& lines) {
    write_file(path, lines);
    const std::string message = refused(on_demo("generate", {"--prompts-jsonl", path}));
    expect_names(message, {path});
    return message;
  };
  expect_names(refusal_of_lines(""), {"no prompts"});
  expect_names(refusal_of_lines("\"a\"\n3\n"), {"line 2", "\"3\"", "{\"prompt\": \"...\"}"});
  expect_names(refusal_of_lines("{\"prompt\": 3}\n"), {"line 1", "prompt"});
  expect_names(refusal_of_lines("{\"prompt\": \"a\", \"stop\": \"b\"}\n"), {"line 1", "\"stop\"", "\"prompt\""});
  expect_names(refusal_of_lines("\"a\n"), {"line 1", "JSON"});

  expect_names(refused({"generate", "--model", "synthetic:tiny", "--prompt", "x"}),
               {"synthetic:tiny", "--random-ids", "--ids"});
}

TEST(BadRequest, IdsThatAreNoIds) {
  expect_names(refused(on_demo("generate", {"--ids", "1 2 x"})), {"--ids", "\"x\""});
  expect_names(refused(on_demo("generate", {"--ids", ""})), {"--ids", "nothing"});
  expect_names(refused(on_demo("generate", {"--ids", "1 4096"})), {"4096", "0 to 4095"});
  expect_names(refused(on_demo("generate", {"--ids", "-1"})), {"-1", "0 to 4095"});
  expect_names(refused(on_demo("generate", {"--ids", "99999999999"})), {"\"99999999999\""});
  expect_names(refused({"tokenize", "--model", demo_model(), "--decode", "5 4096"}), {"4096", "0 to 4095"});
  const TempFolder folder;
  for (const std::string ids : {"", "4096", "1,2"}) {
    (void)refused(on_demo("logits", {"--ids", ids, "--output", folder / "x"}));
  }
  EXPECT_TRUE(entries_of(folder.path()).empty());
}

TEST(BadRequest, MoreThanContextOrMemoryHold) {
  const std::string longer(4000, 'x');  // at least a token for every 16 bytes
  expect_names(refused(on_demo("generate", {"--prompt", longer, "--max-context", "200", "--max-tokens", "8"})),
               {"prompt tokens", "--max-tokens 8", "at most 200", "--max-context"});
  expect_names(refused(on_demo("generate", {"--prompt", "x", "--max-tokens", "16384"})),
               {"at most 16384", "--max-context"});
  const TempFolder folder;
  expect_names(refused(on_demo("logits", {"--ids", "1 2 3", "--max-context", "2", "--output", folder / "x"})),
               {"3 tokens", "at most 2", "--max-context"});
  EXPECT_TRUE(entries_of(folder.path()).empty());
  const std::string too_little = refused(
      {"info", "--model", "synthetic:tiny", "--device", "cpu", "--max-context", "16000000", "--max-seqs", "4096"});
  expect_names(too_little, {"4096 sequences of 16000000 tokens", "a need of", "TB", "free", "--max-context",
                            "number of sequences"});
  // A batch: 200 prompts, each with nearly all the context that a flag can ask for.
  std::string lines;
  for (int i = 0; i < 200; ++i) lines += "\"x\"\n";
  write_file(folder / "prompts.jsonl", lines);
  expect_names(refused(on_demo("generate", {"--prompts-jsonl", folder / "prompts.jsonl", "--max-context", "16000000"})),
               {"200 sequences of 16000000 tokens", "free", "number of sequences"});
}

TEST(BadRequest, WeightFormatThatIsNotKnown) {
  for (const char* command : {"info", "generate"}) {
    expect_names(refused(on_demo(command, {"--weights", "int3"})),
                 {"--weights", "\"int3\"", "stored, int4 or int4,head"});
  }
}

TEST(BadRequest, AttentionThatIsNotKnown) {
  const TempFolder folder;
  const std::string path = folder / "attention.json";
  const auto refusal_of_file = [&](const std::string& text) {
    write_file(path, text);
    const std::string message = refused({"info", "--model", demo_model(), "--device", "cpu", "--attention", path});
    expect_names(message, {path});
    return message;
  };
  expect_names(refused({"info", "--model", demo_model(), "--attention", "densest"}), {"\"densest\"", "dense", ".json"});
  expect_names(refusal_of_file(R"({"attention": [{"layers": "all", "backend": "dense", "budget": 1}]})"),
               {"rule 1", "\"budget\"", "layers, backend"});
  expect_names(refusal_of_file(R"({"attentoin": []})"), {"\"attentoin\"", "attention"});
  expect_names(refusal_of_file(R"({"attention": [{"layers": "0-8", "backend": "dense"}]})"), {"0-8", "0-7"});
  expect_names(refusal_of_file(R"({"attention": [{"layers": "2-", "backend": "dense"}]})"), {"no rule for layer 0"});
  expect_names(refused({"info", "--model", demo_model(), "--attention", folder / "none.json"}), {folder / "none.json"});
}

TEST(BadRequest, OutputsThatCannotBeWritten) {
  const TempFolder folder;
  write_file(folder / "file", "x");
  const auto refusal_of_output = [&](const std::string& path) {
    const std::string message = refused(on_demo("logits", {"--ids", "1", "--output", path}));
    EXPECT_EQ(entries_of(folder.path()), (std::set<std::string>{"file"})) << message;
    return message;
  };
  expect_names(refusal_of_output(folder.path()), {folder.path(), "a folder"});
  expect_names(refusal_of_output(folder / "none/x"), {folder / "none/x", folder / "none"});
  expect_names(refusal_of_output(folder / "file/x"), {folder / "file/x"});
  expect_names(refusal_of_output("/dev/null"), {"/dev/null", "no regular file"});
  expect_names(refusal_of_output(""), {"--output", "empty"});
  expect_names(refused({"attend", "--input", folder / "file", "--output", folder / "none/x"}), {folder / "none"});
}

TEST(BadRequest, AFolderThatMayNotBeWritten) {
  if (geteuid() == 0) GTEST_SKIP() << "root may write into any folder";
  const TempFolder folder;
  std::filesystem::permissions(folder.path(), std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
  expect_names(refused(on_demo("logits", {"--ids", "1", "--output", folder / "x"})),
               {folder / "x", "cannot be written"});
  std::filesystem::permissions(folder.path(), std::filesystem::perms::owner_all);
}

TEST(BadRequest, CudaWithoutAGpu) {
  if (cuda_unavailable_reason().empty()) GTEST_SKIP() << "this machine has a usable GPU";
  expect_names(refused({"info", "--model", demo_model(), "--device", "cuda"}), {"--device cuda", "--device cpu"});
  const RunResult automatic = run_well({"info", "--model", demo_model(), "--device", "auto"});
  EXPECT_TRUE(automatic.err.starts_with("info: running on the CPU: ")) << automatic.err;
}

TEST(Failures, AFullDiskIsNoSuccess) {
  if (access("/dev/full", W_OK) != 0) GTEST_SKIP() << "no /dev/full here";
  const RunResult result =
      run_vesper({"info", "--model", demo_model(), "--device", "cpu"}, {.stdout_path = "/dev/full"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_NE(result.err.find("error: writing to stdout: found No space left on device"), std::string::npos)
      << result.err;
}

// The first file to be opened must not get the number of a stream that is not there, and its bytes with it.
TEST(Failures, StandardStreamsThatAreNotThere) {
  const std::vector<std::string> bad = {"info", "--model", "none", "--device", "cpu"};
  EXPECT_EQ(run_vesper(bad, {.closed = {STDERR_FILENO}}).exit_code, 2);
  EXPECT_EQ(run_vesper(bad, {.closed = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}}).exit_code, 2);
  const RunResult deaf = run_vesper(on_demo("generate", {"--max-tokens", "2"}), {.closed = {STDIN_FILENO}});
  EXPECT_EQ(deaf.exit_code, 2);
  EXPECT_NE(deaf.err.find("error: reading stdin: found Bad file descriptor"), std::string::npos) << deaf.err;
  const TempFolder folder;
  const std::vector<std::string> logits = on_demo("logits", {"--ids", "1 2", "--output", folder / "x"});
  EXPECT_EQ(run_vesper(logits, {.closed = {STDOUT_FILENO, STDERR_FILENO}}).exit_code, 0);
  const std::string written = read_file(folder / "x");
  (void)run_well(logits);
  EXPECT_EQ(written, read_file(folder / "x"));
  if (access("/dev/full", W_OK) == 0) {
    EXPECT_EQ(run_vesper(bad, {.stderr_path = "/dev/full"}).exit_code, 2);
  }
}

TEST(Help, TellsEveryFlagOfEveryCommand) {
  const RunResult root = run_well({"--help"});
  EXPECT_EQ(root.err, "");
  const std::vector<std::vector<std::string>> commands = {{"generate"},
                                                          {"chat"},
                                                          {"tokenize"},
                                                          {"logits"},
                                                          {"attend"},
                                                          {"info"},
                                                          {"compare"},
                                                          {"eval", "ppl"},
                                                          {"eval", "needle"},
                                                          {"eval", "fidelity"},
                                                          {"eval", "guarantee"},
                                                          {"bench"},
                                                          {"repro"}};
  const auto with = [](std::vector<std::string> words, const std::string& flag) {
    words.push_back(flag);
    return words;
  };
  for (const std::vector<std::string>& command : commands) {
    EXPECT_NE(root.out.find("  " + command[0] + ' '), std::string::npos) << root.out;
    const std::string help = run_well(with(command, "--help")).out;
    // By name, wherever the binary lies: scripts and line widths do not depend on a path.
    EXPECT_NE(help.find("\nUsage: vesper " + command[0] + ' '), std::string::npos) << help;
    const RunResult unknown = run_vesper(with(command, "--no-such-flag"));
    std::istringstream flags(unknown.err.substr(unknown.err.find("its flags: ") + 11));
    int count = 0;
    for (std::string flag; flags >> flag; ++count) {
      const std::string name = flag.substr(0, flag.find(','));
      if (!name.starts_with("--")) continue;  // what has no flag stands there by its type
      const std::string row = "\n  " + name;
      EXPECT_TRUE(help.find(row + ' ') != std::string::npos || help.find(row + '\n') != std::string::npos)
          << "no " << name << " in:\n"
          << help;
    }
    EXPECT_GE(count, 5) << unknown.err;
    std::istringstream lines(help.substr(0, help.find("\nExample")));
    for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 90U) << line;
  }
  EXPECT_EQ(run_well({"--version"}).out.substr(0, 7), "vesper ");
}

}  // namespace
}  // namespace vesper

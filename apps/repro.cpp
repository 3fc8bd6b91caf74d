// vesper repro: a paper's table or figure, its printed numbers and ours side by side.
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "apps/options.h"
#include "apps/progress.h"
#include "apps/repro_report.h"
#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/core/mapped_file.h"

namespace vesper {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kQuickRepeats = 3;
constexpr int kQuickTokens = 16;

struct ReproOptions {
  std::string name;
  bool quick = false;
  bool resume = false;
  std::optional<int> repeats;
  std::optional<int> max_tokens;
  std::string out;
  ModelOptions model;
  std::string peer_csv;
};

// The binary that a figure was measured with: its version and its content (FNV-1a, 64 bits).
std::string binary_version() {
  const MappedFile file("/proc/self/exe");
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const std::byte byte : file.bytes()) {
    hash = (hash ^ std::to_integer<std::uint64_t>(byte)) * 0x100000001b3U;
  }
  return fmt::format("vesper {}, build {:016x}", VESPER_VERSION, hash);
}

std::string read_text(const std::string& path, const std::string& flag) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) refuse({"reading " + flag, "no file " + path + " that can be read", "one", ""});
  return text.str();
}

// Whole or not at all: an interrupted run leaves the file that was there.
void write_text(const fs::path& path, const std::string& text) {
  const fs::path beside = path.string() + ".new";
  std::ofstream file(beside, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  std::error_code error;
  if (file) fs::rename(beside, path, error);
  if (!file || error) fail({"writing " + path.string(), "that it was not taken", "", "make room, or change --out"});
}

// Finished cells, saved one by one.
class CellStore {
 public:
  CellStore(fs::path path, bool resume) : path_(std::move(path)), saved_(Json::array()) {
    if (resume && fs::exists(path_)) saved_ = read_json_file(path_.string());
    if (!saved_.is_array()) refuse({"reading " + path_.string(), "no list", "saved cells", "run without --resume"});
  }

  [[nodiscard]] std::optional<ReproResult> find(const Json& key) const {
    for (const Json& cell : saved_) {
      if (cell.is_object() && cell.value("key", Json()) == key && cell.contains("result")) {
        return parse_result(cell["result"], path_.string());
      }
    }
    return {};
  }
  void add(const Json& key, const ReproResult& result) {
    saved_.push_back({{"key", key}, {"result", result_json(result)}});
    write_text(path_, saved_.dump(1) + '\n');
  }

 private:
  fs::path path_;
  Json saved_;
};

// Draws OUT/NAME.json; says in a sentence why not, where it cannot.
void plot(const fs::path& folder, const std::string& name) {
  const fs::path script = fs::path(configs_folder("repro")) / "../../apps/plots/repro.py";
  if (!fs::exists(script)) return spdlog::warn("no plot: {} is not there", script.lexically_normal().string());
  const std::string path = script.lexically_normal().string();
  const std::string data = (folder / (name + ".json")).string();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    execlp("python3", "python3", path.c_str(), data.c_str(), static_cast<char*>(nullptr));
    _exit(127);  // no python3
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) {
    return spdlog::warn("no plot: python3 could not be run");
  }
  if (WEXITSTATUS(status) == 127) return spdlog::warn("no plot: python3 is not installed; the tables are complete");
  if (WEXITSTATUS(status) == 3) {
    return spdlog::warn("no plot: python3 has no matplotlib (pip install matplotlib); the tables are complete");
  }
  if (WEXITSTATUS(status) != 0) spdlog::warn("no plot: {} ended with {}", path, WEXITSTATUS(status));
}

int list_experiments() {
  for (const std::string& name : experiment_names()) fmt::print("{:<18} {}\n", name, load_experiment(name).title);
  return 0;
}

// Measures what is not saved yet, in the experiment's order.
std::vector<ReproResult> measure(const std::vector<ReproCell>& cells, const ReproSetting& setting, const ReproRun& run,
                                 const std::string& name, CellStore& store) {
  const auto key_of = [&](const ReproCell& cell) {
    Json key = cell_key(cell, setting);
    key["binary"] = run.binary;
    key["device"] = run.device;
    return key;
  };
  std::vector<std::optional<ReproResult>> found;
  std::int64_t left = 0;
  for (const ReproCell& cell : cells) left += found.emplace_back(store.find(key_of(cell))) ? 0 : 1;
  constexpr std::int64_t kParts = 1000;
  std::int64_t done = 0;
  ProgressLine progress("repro " + name, ProgressUnit::kCells);
  std::vector<ReproResult> results;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    if (!found[i]) {
      progress.update(done, left * kParts);
      found[i] = measure_cell(cells[i], setting, [&](double share) {
        progress.update(done + static_cast<std::int64_t>(share * (kParts - 1)), left * kParts);
      });
      store.add(key_of(cells[i]), *found[i]);
      done += kParts;
    }
    results.push_back(*found[i]);
  }
  progress.finish();
  return results;
}

// What decides the figures, as it would be typed.
std::string command_of(const ReproOptions& options) {
  std::string command = "vesper repro " + options.name;
  if (options.quick) command += " --quick";
  if (options.repeats) command += fmt::format(" --repeats {}", *options.repeats);
  if (options.max_tokens) command += fmt::format(" --max-tokens {}", *options.max_tokens);
  if (!options.model.model.empty()) command += " --model " + options.model.model;
  return command;
}

int run(const ReproOptions& options) {
  if (options.name == "list") return list_experiments();
  const Experiment whole = load_experiment(options.name);
  Experiment experiment = options.quick ? quick_part(whole) : whole;
  ReproSetting setting;
  setting.engine = engine_options(options.model, 1);
  setting.repeats = options.repeats.value_or(options.quick ? kQuickRepeats : setting.repeats);
  setting.max_tokens = options.max_tokens.value_or(options.quick ? kQuickTokens : setting.max_tokens);
  if (!options.model.model.empty()) {
    (void)model_config_of(options.model.model);
    for (ReproPanel& panel : experiment.panels) panel.model = options.model.model;
  }
  std::vector<PeerTime> peers;
  if (!options.peer_csv.empty()) peers = parse_peers(read_text(options.peer_csv, "--peer-csv"), options.peer_csv);

  const fs::path folder = options.out.empty() ? fs::path("repro") / experiment.name : fs::path(options.out);
  std::error_code error;
  fs::create_directories(folder, error);
  if (error || access(folder.c_str(), W_OK) != 0) {
    refuse({"making the folder " + folder.string(), "none that can be written", "one", "change --out"});
  }
  const DeviceKind device = setting.engine.limits.device;
  ReproRun run{.command = command_of(options),
               .binary = binary_version(),
               .device = device_info(device).name,
               .kind = device,
               .roof = {},
               .clocks_before = read_clocks(),
               .clocks_after = {}};
  const std::vector<ReproCell> cells = plan_cells(experiment);
  CellStore store(folder / "cells.json", options.resume);
  const std::vector<ReproResult> results = measure(cells, setting, run, options.name, store);
  run.clocks_after = read_clocks();
  for (const ReproResult& result : results) run.roof = higher(run.roof, result.roof);

  const std::vector<ReproRow> rows = make_rows(experiment, cells, results, peers, device == DeviceKind::kCuda);
  const std::string markdown = repro_markdown(experiment, run, rows);
  write_text(folder / (experiment.name + ".md"), markdown);
  write_text(folder / (experiment.name + ".csv"), repro_csv(rows));
  write_text(folder / (experiment.name + ".json"), repro_json(experiment, run, rows).dump(2) + '\n');
  fmt::print("{}", markdown);
  plot(folder, experiment.name);
  return 0;
}

}  // namespace

Command make_repro(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "repro",
      "A paper's table or figure again: its printed numbers, ours, and what the bytes allow, side by side. Writes "
      "Markdown, CSV, JSON and a plot.");
  app->footer(
      "Examples:\n"
      "  vesper repro list\n"
      "  vesper repro quest-fig9\n"
      "  vesper repro quest-fig10 --resume              goes on where it was interrupted\n"
      "  vesper repro quest-fig9 --quick --model synthetic:tiny --device cpu\n"
      "  apps/peers/run.sh --model synthetic:llama-2-7b --context 32k --batch 1 > peers.csv\n"
      "  vesper repro quest-fig9 --peer-csv peers.csv\n\n"
      "Columns of the CSV (docs/repro.md tells what each experiment is):\n" +
      repro_definitions());
  auto options = std::make_shared<ReproOptions>();
  app->add_option("name", options->name, "An experiment of configs/repro, or list")
      ->required()
      ->check(some_text())
      ->type_name("NAME")
      ->group(kInputFlags);
  app->add_option("--model", options->model.model,
                  "A model or synthetic:NAME in place of the experiment's own, which it then no longer reproduces")
      ->check(some_text())
      ->type_name("DIR")
      ->group(kModelFlags);
  app->add_flag("--quick", options->quick, "A part of the sweep, with fewer repeats of steps")->group(kInputFlags);
  app->add_option("--repeats", options->repeats, "Times that a step's attentions run, instead of 9 (3 with --quick)")
      ->check(whole_number(2, 1000))
      ->type_name("N")
      ->group(kInputFlags);
  app->add_option("--max-tokens", options->max_tokens, "Tokens that such a repeat decodes, instead of 32 (16)")
      ->check(whole_number(1, 1 << 20))
      ->type_name("N")
      ->group(kInputFlags);
  app->add_flag("--resume", options->resume,
                "Take finished cells from the folder, where settings, binary and device are the same")
      ->group(kInputFlags);
  app->add_option("--peer-csv", options->peer_csv, "Times of other engines on this machine, as apps/peers print them")
      ->check(some_text())
      ->type_name("FILE")
      ->group(kInputFlags);
  app->add_option("--out", options->out, "The folder to write to; ./repro/NAME where it is not given")
      ->check(some_text())
      ->type_name("DIR")
      ->group(kOutputFlags);
  add_hardware_flags(*app, options->model);
  add_seed_flag(*app, options->model, "Of drawn weights, ids, keys and page tables", kRunFlags);
  return Command{app, [options] { return run(*options); }};
}

}  // namespace vesper

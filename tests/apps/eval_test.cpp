// vesper eval: the documents of its kinds, and what they refuse.
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/apps/run_vesper.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

std::string ids_file() {
  return demo_model() + "/questions/ids_4096.u16";
}

std::string index_file() {
  return demo_model() + "/questions/index.json";
}

std::vector<std::string> eval(const std::string& kind, const std::vector<std::string>& more,
                              const std::string& model = demo_model()) {
  std::vector<std::string> arguments = {"eval", kind, "--model", model, "--device", "cpu"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

TEST(Eval, PerplexityOfTextAndOfIdsIsOneMeasurement) {
  const std::string text = demo_model() + "/needle-4k.txt";
  const Json of_text = Json::parse(
      run_well(eval("ppl", {"--text", text, "--context", "200", "--last", "20", "--windows", "2", "--json"})).out);
  EXPECT_EQ(of_text.at("kind"), "ppl");
  EXPECT_EQ(of_text.at("attention"), "dense");
  EXPECT_EQ(of_text.at("context"), 200);
  EXPECT_EQ(of_text.at("last"), 20);
  EXPECT_EQ(of_text.at("windows"), 2);
  const auto nll = of_text.at("window_nll").get<std::vector<double>>();
  ASSERT_EQ(nll.size(), 2U);
  EXPECT_NEAR(of_text.at("nll").get<double>(), (nll[0] + nll[1]) / 2, 1e-12);
  EXPECT_NEAR(of_text.at("perplexity").get<double>(), std::exp((nll[0] + nll[1]) / 2), 1e-9);

  // The second window by hand: BOS, then the text's ids from 200 on.
  std::istringstream ids(run_well({"tokenize", "--model", demo_model(), "--file", text}).out);
  std::string bytes("\1\0", 2);
  int id = 0;
  for (int i = 0; i < 400 && ids >> id; ++i) {
    if (i < 200) continue;
    bytes += static_cast<char>(id & 255);
    bytes += static_cast<char>(id >> 8);
  }
  const TempFolder folder;
  write_file(folder / "ids.u16", std::string("\2\0", 2) + bytes);
  const Json of_ids = Json::parse(run_well(eval("ppl", {"--ids", folder / "ids.u16", "--offsets", "1 1", "--context",
                                                        "200", "--last", "20", "--json"}))
                                      .out);
  EXPECT_EQ(of_ids.at("window_nll"), Json({nll[1], nll[1]}));

  const std::string line =
      run_well(eval("ppl", {"--text", text, "--context", "200", "--last", "20", "--windows", "2"})).out;
  EXPECT_TRUE(line.starts_with("dense: perplexity ")) << line;
  EXPECT_TRUE(line.ends_with("(2 windows of 200 tokens, the last 20 of each through decode)\n")) << line;
}

TEST(Eval, DenseIsFaithfulToDenseAndSparseNearIt) {
  const auto fidelity = [](const std::string& attention) {
    return Json::parse(run_well(eval("fidelity", {"--ids", ids_file(), "--context", "300", "--last", "10",
                                                  "--attention", attention, "--json"}))
                           .out);
  };
  const Json dense = fidelity("dense");
  EXPECT_EQ(dense.at("kl"), Json({{"mean", 0.0}, {"p99", 0.0}, {"max", 0.0}}));
  EXPECT_EQ(dense.at("top1_agreement"), 1.0);
  EXPECT_EQ(dense.at("perplexity").at("dense"), dense.at("perplexity").at("engine"));
  const Json sparse = fidelity("quest:token_budget=64");
  EXPECT_GT(sparse.at("kl").at("mean").get<double>(), 0.0);
  EXPECT_EQ(sparse.at("perplexity").at("dense"), dense.at("perplexity").at("dense"));
  const Json& layers = sparse.at("layers").back();
  EXPECT_EQ(layers.at("layers"), "2-7");
  EXPECT_EQ(layers.at("sparse_steps"), 6 * 10);
  EXPECT_LT(layers.at("kept_share").get<double>(), 0.25);
  EXPECT_TRUE(sparse.at("layers").at(0).at("kept_share").is_null());  // dense: no list, no share
  EXPECT_TRUE(dense.at("layers").at(0).at("sampled_share").is_null());

  const Json& exact = dense.at("by_layer").at(7);
  EXPECT_EQ(exact.at("error"), Json({{"p50", 0.0}, {"p95", 0.0}, {"p99", 0.0}}));
  EXPECT_EQ(exact.at("kept_mass"), Json({{"mean", 1.0}, {"least", 1.0}}));
  const Json& lossy = sparse.at("by_layer").at(7);
  EXPECT_EQ(lossy.at("backend"), "quest");
  EXPECT_EQ(lossy.at("steps"), 10);
  EXPECT_EQ(lossy.at("sparse_steps"), 10);
  EXPECT_GT(lossy.at("error").at("p99").get<double>(), 0.0);
  EXPECT_GE(lossy.at("error").at("p99"), lossy.at("error").at("p50"));
  EXPECT_LT(lossy.at("kept_mass").at("least").get<double>(), 1.0);
  EXPECT_LE(lossy.at("kept_mass").at("least"), lossy.at("kept_mass").at("mean"));
  EXPECT_LT(lossy.at("kept_share").get<double>(), 0.25);
  EXPECT_EQ(lossy.at("heads").size(), 4U);
  EXPECT_EQ(lossy.at("kv_heads").size(), 2U);
}

TEST(Eval, FidelityHasALineForEachLayer) {
  const std::string out = run_well(eval("fidelity", {"--ids", ids_file(), "--context", "300", "--last", "4",
                                                     "--attention", source_dir() + "/configs/attention/mixed.json"}))
                              .out;
  EXPECT_NE(out.find("\n0      dense       exact\n"), std::string::npos) << out;
  EXPECT_NE(out.find("\n2      quest       dense throughout"), std::string::npos) << out;
  EXPECT_NE(out.find("\n4      twilight  "), std::string::npos) << out;
}

TEST(Eval, GuaranteeCountsTrialsAndGivesVerdicts) {
  const auto guarantee = [](const std::vector<std::string>& more) {
    const std::string settings = "epsilon=0.1,delta=0.05,pilot=64,sink_tokens=8,window_tokens=8,top_k_by=oracle";
    std::vector<std::string> arguments =
        eval("guarantee", {"--ids", ids_file(), "--context", "600", "--last", "2", "--seeds", "6", "--attention",
                           "vattention:verify=denominator," + settings});
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_well(arguments);
  };
  const std::string out = guarantee({"--json"}).out;
  EXPECT_EQ(guarantee({"--json"}).out, out);
  const Json document = Json::parse(out);
  EXPECT_EQ(document.at("kind"), "guarantee");
  EXPECT_EQ(document.at("seeds"), 6);
  ASSERT_EQ(document.at("runs").size(), 1U);
  const Json& run = document.at("runs").at(0);
  EXPECT_EQ(run.at("layers"), "2-7");
  EXPECT_EQ(run.at("epsilon"), 0.1);
  EXPECT_EQ(run.at("delta"), 0.05);
  EXPECT_EQ(run.at("promised"), Json({{"denominator", true}, {"output", false}}));
  EXPECT_EQ(run.at("by_layer").size(), 6U);
  const Json& all = run.at("escalate").at("denominator").at("all");
  EXPECT_EQ(all.at("trials"), 2 * 6 * 6 * 4);
  EXPECT_GT(all.at("bound"), all.at("rate"));
  EXPECT_EQ(all.at("holds").get<bool>(), all.at("bound").get<double>() <= 0.05);
  EXPECT_GE(run.at("escalate").at("kept_share"), run.at("report").at("kept_share"));
  std::int64_t misses = 0;
  for (const Json& layer : run.at("by_layer")) {
    ASSERT_EQ(layer.at("heads").size(), 4U);
    for (const Json& head : layer.at("heads")) misses += head.at("denominator").at("all").at("misses").get<int>();
  }
  EXPECT_EQ(all.at("misses"), misses);

  const std::string text = guarantee({}).out;
  EXPECT_NE(text.find("layers 2-7 vattention epsilon=0.1 delta=0.05"), std::string::npos) << text;
  EXPECT_NE(text.find("at delta 0.05, nor is it promised\n"), std::string::npos) << text;
  EXPECT_NE(text.find("  worst denominator: layer "), std::string::npos) << text;
}

TEST(Eval, SyntheticModelsNeedNoTokenizer) {
  const TempFolder folder;
  write_file(folder / "ids.u16", std::string(130, '\1'));
  const Json document =
      Json::parse(run_well(eval("ppl", {"--ids", folder / "ids.u16", "--context", "64", "--last", "64", "--json"},
                                "synthetic:tiny"))
                      .out);
  EXPECT_TRUE(std::isfinite(document.at("nll").get<double>()));
}

TEST(Eval, NeedlesAreHiddenAndFound) {
  const std::string text = demo_model() + "/needle-4k.txt";
  const std::vector<std::string> arguments =
      eval("needle", {"--text", text, "--context", "1024", "--questions", "6", "--json"});
  const std::string out = run_well(arguments).out;
  const Json document = Json::parse(out);
  EXPECT_EQ(document.at("words").at("total"), 4);
  EXPECT_EQ(document.at("numbers").at("total"), 2);
  int right = 0;
  for (const Json& answer : document.at("answers")) {
    right += static_cast<int>(answer.at("right").get<bool>());
    const auto value = answer.at("value").get<std::string>();
    EXPECT_EQ(answer.at("right"), answer.at("answer").get<std::string>().compare(1, value.size(), value) == 0)
        << answer;
  }
  EXPECT_EQ(document.at("words").at("right").get<int>() + document.at("numbers").at("right").get<int>(), right);
  EXPECT_GE(right, 5) << document;
  EXPECT_EQ(run_well(arguments).out, out);
}

TEST(Eval, RowsOfIdsAreAsked) {
  const RunResult result = run_well(eval("needle", {"--ids", ids_file(), "--index", index_file(), "--context", "4096",
                                                    "--questions", "3", "--log-level", "warn"}));
  EXPECT_EQ(result.out, "dense at 4096 tokens: words 4 of 4 (100.0 %)\n");
  EXPECT_EQ(result.err, "");
}

TEST(Eval, RefusesWhatCannotBe) {
  expect_names(
      refused(eval("needle", {"--ids", ids_file(), "--index", index_file(), "--context", "4096", "--questions", "81"})),
      {"--questions", "81", "at most 80", "20 rows"});
  expect_names(refused({"eval"}), {"vesper eval", "found nothing", "ppl, needle, fidelity, guarantee"});
  expect_names(refused({"eval", "pl"}), {"\"pl\"", "ppl, needle, fidelity, guarantee", "`vesper eval --help`"});
  expect_names(refused({"eval", "--json", "ppl"}), {"\"--json\"", "vesper eval ppl and then its flags"});
  expect_names(refused({"eval", "ppl"}), {"no --model", "`vesper eval ppl --help`"});
  expect_names(refused(eval("ppl", {"--context", "64", "--bogus"})), {"vesper eval ppl", "\"--bogus\"", "--offsets"});
  expect_names(refused(eval("ppl", {"--context", "64"})), {"--text", "--ids"});
  expect_names(refused(eval("ppl", {"--context", "64", "--ids", ids_file(), "--text", "x"})), {"--ids", "--text"});
  expect_names(refused(eval("ppl", {"--context", "64", "--text", "x"}, "synthetic:tiny")), {"tokenizer", "--ids"});
  expect_names(refused(eval("ppl", {"--context", "1", "--ids", ids_file()})), {"--context", "from 2"});
  expect_names(refused(eval("ppl", {"--context", "64", "--last", "65", "--ids", ids_file()})), {"--last", "65", "64"});
  expect_names(refused(eval("ppl", {"--context", "64", "--last", "9", "--ids", ids_file(), "--max-context", "63"})),
               {"64 tokens", "at most 63", "--max-context"});
  expect_names(refused(eval("ppl", {"--context", "64", "--last", "9", "--ids", ids_file(), "--offsets", "0 81877"})),
               {ids_file(), "81877, of 81940", "65 tokens"});
  expect_names(refused(eval("ppl", {"--context", "64", "--ids", ids_file(), "--offsets", "0 x"})),
               {"--offsets", "\"x\""});
  expect_names(refused(eval("ppl", {"--context", "64", "--last", "9", "--ids", index_file() + ".none"})), {".none"});
  expect_names(refused(eval("needle", {"--context", "64", "--ids", ids_file()})), {"--index"});
  expect_names(refused(eval("needle", {"--context", "64", "--text", index_file(), "--index", index_file()})),
               {"--index"});
  expect_names(refused(eval("needle", {"--context", "64", "--ids", ids_file(), "--index", index_file()})),
               {index_file(), "\"64\"", "\"4096\"", "--context"});
  expect_names(refused(eval("needle", {"--context", "64", "--text", demo_model() + "/needle-4k.txt"})),
               {"--context 64", "raise --context"});
  expect_names(
      refused(eval("fidelity", {"--context", "64", "--last", "9", "--ids", ids_file(), "--attention", "qest"})),
      {"qest"});
  expect_names(refused(eval("guarantee", {"--context", "64", "--ids", ids_file(), "--attention", "quest"})),
               {"--attention quest", "no layer with vattention", "use --attention vattention"});
  expect_names(refused(eval("guarantee", {"--context", "64", "--ids", ids_file()})), {"--attention dense"});
  expect_names(refused(eval("guarantee", {"--context", "64", "--ids", ids_file(), "--seeds", "0"})),
               {"--seeds", "from 1"});
  expect_names(refused(eval("guarantee", {"--context", "3", "--ids", ids_file(), "--attention", "vattention"})),
               {"--last", "at most --context, 3"});
}

TEST(Eval, HelpOfEachKindFitsATerminal) {
  for (const std::string kind : {"ppl", "needle", "fidelity", "guarantee"}) {
    std::istringstream lines(run_well({"eval", kind, "--help"}).out);
    int flags = 0;
    for (std::string line; std::getline(lines, line);) {
      EXPECT_LE(line.size(), 90U) << line;
      flags += static_cast<int>(line.starts_with("  --"));
    }
    EXPECT_GE(flags, 12) << kind;
  }
}

}  // namespace
}  // namespace vesper

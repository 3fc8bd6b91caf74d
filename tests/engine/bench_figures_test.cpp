// Figures of the bench and what they refuse, by hand.
#include "engine/bench_figures.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/core/error.h"

namespace vesper {
namespace {

BenchRow row_of() {
  BenchRow row;
  row.attention = "quest";
  row.context = 32768;
  row.batch = 2;
  row.step_s = {0.010, 0.012, 0.011, 0.011};
  row.device_s = row.step_s;
  row.tpot_s = {0.011, 0.011};
  row.weight_bytes = 10'000'000'000;
  row.kv_bytes = 4e8;
  row.metadata_bytes = 1e8;
  row.dense_kv_bytes = 5e9;
  row.sparse = true;
  row.lists = 100;
  row.listed_tokens = 1000;
  row.visible_tokens = 32000;
  row.speedup = {.value = 1.3, .low = 1.29, .high = 1.31};
  row.roof.read_bytes_per_s = 1e12;
  row.cache_bytes = 50'000'000;
  return row;
}

std::string error_of(const BenchRow& row) {
  try {
    check_row(row);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kRun);
    return error.what();
  }
  return "";
}

TEST(BenchFigures, BytesRatesAndTheCeilingFollowFromTheRow) {
  const BenchRow row = row_of();
  EXPECT_DOUBLE_EQ(mean_step_s(row), 0.011);
  EXPECT_DOUBLE_EQ(step_bytes(row), 1.05e10);
  EXPECT_DOUBLE_EQ(*roof_share(row), 1.05e10 / 0.011 / 1e12);
  EXPECT_DOUBLE_EQ(speedup_ceiling(row), 1.5);
  EXPECT_EQ(error_of(row), "");
}

TEST(BenchFigures, PrefillIsComparedWithTheMatrixRate) {
  BenchRow row = row_of();
  EXPECT_FALSE(prefill_share(row).has_value());  // nothing was prefilled
  row.ttft_s = 2.0;
  row.prefill_flops = 6e14;
  row.roof.matrix_flops_per_s = 5e14;
  EXPECT_DOUBLE_EQ(*prefill_share(row), 0.6);
}

TEST(BenchFigures, BytesThatACacheHoldsSayNothingOfMemory) {
  BenchRow row = row_of();
  row.cache_bytes = 3'000'000'000;
  EXPECT_FALSE(roof_share(row).has_value());
  row.roof.read_bytes_per_s = 1.0;
  EXPECT_EQ(error_of(row), "");
}

TEST(BenchFigures, AFigureAboveTheRoofIsRefused) {
  BenchRow row = row_of();
  row.roof.read_bytes_per_s = step_bytes(row) / 0.011 / 1.02;
  EXPECT_EQ(error_of(row), "");
  row.roof.read_bytes_per_s = step_bytes(row) / 0.011 / 1.04;
  EXPECT_NE(error_of(row).find("1.040 x the read rate"), std::string::npos) << error_of(row);
}

TEST(BenchFigures, ASpeedUpThatReadEverythingIsRefused) {
  BenchRow row = row_of();
  row.listed_tokens = row.visible_tokens;
  EXPECT_NE(error_of(row).find("a speed-up of 1.30 whose device counters say dense"), std::string::npos);
  row.lists = row.listed_tokens = row.visible_tokens = 0;  // never made a list
  EXPECT_NE(error_of(row), "");
  row.speedup = {.value = 1.3, .low = 0.9, .high = 1.8};  // noise
  EXPECT_EQ(error_of(row), "");
  row.speedup = {.value = 1.3, .low = {}, .high = {}};
  EXPECT_NE(error_of(row), "");
  row.sparse = false;  // dense is allowed to be faster than a sparse baseline
  EXPECT_EQ(error_of(row), "");
}

TEST(BenchFigures, EveryRowOfCsvHasTheHeadsColumns) {
  BenchRow row = row_of();
  row.attention = "vattention:epsilon=0.1,delta=0.1";
  const std::string line = csv_line(row);
  EXPECT_NE(line.find(",\"vattention:epsilon=0.1,delta=0.1\","), std::string::npos);
  const std::string head = csv_head();
  EXPECT_EQ(std::count(line.begin(), line.end(), ','), std::count(head.begin(), head.end(), ',') + 1);
  EXPECT_EQ(static_cast<std::size_t>(std::count(head.begin(), head.end(), ',')) + 1, bench_columns().size());
  EXPECT_TRUE(head.starts_with("engine,model,device,weights,fill,attention,context,batch,max_tokens,repeats,ttft_ms,"));
  EXPECT_NE(line.find(",,"), std::string::npos);  // no time to first token
}

TEST(BenchFigures, ListsOfSizesKnowThousandsAndRefuseTheRest) {
  EXPECT_EQ(parse_sizes("1k,8k,32768", "--context", 1 << 24), (std::vector<int>{1024, 8192, 32768}));
  EXPECT_EQ(parse_sizes("7", "--batch", 4096), (std::vector<int>{7}));
  for (const char* text :
       {"", "0", "-1", "1,", ",1", "1x", "k", "1k2", "1.5k", "5000", "5k", "99999999999999999999", "3,3"}) {
    EXPECT_THROW((void)parse_sizes(text, "--batch", 4096), Error) << text;
  }
}

TEST(BenchFigures, SpreadsAreOneNumberOrARange) {
  EXPECT_DOUBLE_EQ(parse_sigma("2.5", "--sigma").least, 2.5);
  EXPECT_DOUBLE_EQ(parse_sigma("2.5", "--sigma").largest, 2.5);
  EXPECT_DOUBLE_EQ(parse_sigma("1:5", "--sigma").largest, 5.0);
  for (const char* text : {"", "0", "nan", "5:1", "1:2:3", "1:", "100", "-1", "2x"}) {
    EXPECT_THROW((void)parse_sigma(text, "--sigma"), Error) << text;
  }
}

}  // namespace
}  // namespace vesper

// Byte pair encoding of single words.
#include "tokenizer/bpe.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <vector>

#include "tests/tokenizer/small_tokenizers.h"

namespace vesper {
namespace {

using Ids = std::vector<std::int32_t>;

// Pieces by id, and merges by the ids of their two parts, the lowest rank first.
Bpe make(const std::vector<std::string>& pieces, const std::vector<std::pair<std::string, std::string>>& pairs,
         const BpeOptions& options = {}) {
  Vocabulary vocabulary(pieces, "x.json");
  std::vector<Merge> merges;
  for (const auto& [left, right] : pairs) {
    merges.push_back({vocabulary.find(left), vocabulary.find(right), vocabulary.find(left + right),
                      static_cast<std::uint32_t>(merges.size())});
  }
  return {std::move(vocabulary), merges, options};
}

Ids ids_of(const Bpe& bpe, const std::string& word) {
  Ids ids;
  bpe.encode(word, ids);
  return ids;
}

TEST(Bpe, MergesTheLowestRankFirst) {
  const Bpe bpe = make({"a", "b", "c", "ab", "bc", "abc"}, {{"b", "c"}, {"a", "b"}, {"ab", "c"}});
  EXPECT_EQ(ids_of(bpe, "abc"), (Ids{0, 4}));  // "bc" comes first, and leaves nothing for "ab"
  EXPECT_EQ(ids_of(bpe, "abab"), (Ids{3, 3}));
  EXPECT_EQ(ids_of(bpe, ""), Ids{});
  EXPECT_EQ(ids_of(bpe, "c"), Ids{2});
}

TEST(Bpe, MergesTheLeftmostOfEqualRankFirst) {
  const Bpe bpe = make({"a", "aa", "aaa"}, {{"a", "a"}});
  EXPECT_EQ(ids_of(bpe, "aaa"), (Ids{1, 0}));
  EXPECT_EQ(ids_of(bpe, "aaaaa"), (Ids{1, 1, 0}));
}

TEST(Bpe, SeesPairsThatMergesBring) {
  const Bpe bpe = make({"a", "b", "ab", "abab", "ababab"}, {{"a", "b"}, {"ab", "ab"}, {"abab", "ab"}});
  EXPECT_EQ(ids_of(bpe, "ababab"), Ids{4});
  EXPECT_EQ(ids_of(bpe, "abababab"), (Ids{3, 3}));
}

TEST(Bpe, AWholePieceStandsForItselfWhereMergesAreIgnored) {
  BpeOptions options;
  EXPECT_EQ(ids_of(make({"a", "b", "c", "abc"}, {}, options), "abc"), (Ids{0, 1, 2}));
  options.ignore_merges = true;
  EXPECT_EQ(ids_of(make({"a", "b", "c", "abc"}, {}, options), "abc"), Ids{3});
  EXPECT_EQ(ids_of(make({"a", "b", "c", "abc"}, {}, options), "abca"), (Ids{0, 1, 2, 0}));
}

TEST(Bpe, WhatHasNoPieceIsRefusedOrUnknown) {
  BpeOptions options;
  const std::vector<std::string> pieces = {"<unk>", "a", "b"};
  EXPECT_NE(refusal_of([&] { (void)ids_of(make(pieces, {}, options), "a\u00E9"); }).find("\"\\u00e9\""),
            std::string::npos);
  options.unk_id = 0;
  EXPECT_EQ(ids_of(make(pieces, {}, options), "xya\u00E9"), (Ids{0, 0, 1, 0}));
  options.fuse_unk = true;
  EXPECT_EQ(ids_of(make(pieces, {}, options), "xyazz\u00E9"), (Ids{0, 1, 0}));
}

TEST(Bpe, FallsBackToBytesWhereAllOfACharacterHaveThem) {
  BpeOptions options;
  options.unk_id = 0;
  options.byte_fallback = true;
  options.fuse_unk = true;
  const Bpe bpe = make({"<unk>", "a", "<0xC3>", "<0xA9>"}, {}, options);
  EXPECT_EQ(ids_of(bpe, "a\u00E9a"), (Ids{1, 2, 3, 1}));
  EXPECT_EQ(ids_of(bpe, "a\u00E8a"), (Ids{1, 0, 1}));                // no <0xA8>
  EXPECT_EQ(ids_of(bpe, "\u00E8\u00E9\u00E8a"), (Ids{2, 3, 0, 1}));  // the reference joins over bytes too
}

TEST(Bpe, BytesNeedNotBeCharacters) {
  BpeOptions options;
  options.bytes = true;
  const Bpe bpe = make({"\xFF", "\xC3", "\xFF\xC3"}, {{"\xFF", "\xC3"}}, options);
  EXPECT_EQ(ids_of(bpe, "\xC3\xFF\xC3"), (Ids{1, 2}));
  EXPECT_NE(refusal_of([&] { (void)ids_of(bpe, "a"); }).find("the byte <0x61>"), std::string::npos);
}

TEST(Bpe, RanksMeanThatAnyTwoPiecesMayMerge) {
  const Vocabulary vocabulary({"a", "b", "c", "bc", "abc", "ab"}, "x");
  std::vector<std::pair<int, int>> found;
  for (const Merge& merge : merges_of_ranks(vocabulary)) {
    EXPECT_EQ(merge.rank, static_cast<std::uint32_t>(merge.result));
    EXPECT_EQ(vocabulary.piece(merge.left) + vocabulary.piece(merge.right), vocabulary.piece(merge.result));
    found.emplace_back(merge.left, merge.right);
  }
  EXPECT_EQ(found, (std::vector<std::pair<int, int>>{{1, 2}, {0, 3}, {5, 2}, {0, 1}}));
}

TEST(Bpe, AWordOfAMegabyteIsNotQuadratic) {
  const Bpe bpe = make({"a", "aa", "aaaa", "aaaaaaaa"}, {{"a", "a"}, {"aa", "aa"}, {"aaaa", "aaaa"}});
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(ids_of(bpe, std::string(1 << 20, 'a')).size(), std::size_t{1} << 17U);
  // A quarter of a second here; by passes over the whole word it would be hours.
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 30.0);
}

TEST(Vocabulary, RefusesHolesAndDoubles) {
  const auto refusal = [](std::vector<std::string> pieces) {
    return refusal_of([&] { const Vocabulary vocabulary(pieces, "x.json"); });
  };
  EXPECT_EQ(refusal({"a", "b"}), "");
  EXPECT_NE(refusal({"a", "", "b"}).find("no piece for the id 1 of 3"), std::string::npos);
  EXPECT_NE(refusal({"a", "b", "a"}).find("the piece \"a\" for the ids 0 and 2"), std::string::npos);
  EXPECT_NE(refusal({std::string(5000, 'a')}).find("a piece of 5000 bytes"), std::string::npos);
  std::vector<std::string> pieces;
  EXPECT_NE(refusal_of([&] { place_piece(pieces, -1, "a", "x.json"); }).find("the id -1"), std::string::npos);
  EXPECT_NE(refusal_of([&] { place_piece(pieces, 1 << 30, "a", "x.json"); }).find("the id 1073741824"),
            std::string::npos);
  EXPECT_NE(refusal_of([&] { place_piece(pieces, 0, "", "x.json"); }).find("an empty piece"), std::string::npos);
  place_piece(pieces, 0, "a", "x.json");
  EXPECT_NE(refusal_of([&] { place_piece(pieces, 0, "b", "x.json"); }).find("for \"a\" and for \"b\""),
            std::string::npos);
}

TEST(Vocabulary, SpellsPiecesInBytes) {
  const Vocabulary bytes = Vocabulary({"\u0120a", "\u010A", "\u00E9", "\uFF5Cb", "a b"}, "x").in_bytes();
  EXPECT_EQ(bytes.piece(0), " a");
  EXPECT_EQ(bytes.piece(1), "\n");
  EXPECT_EQ(bytes.piece(2), "\xE9");
  EXPECT_EQ(bytes.find(" a"), 0);
  EXPECT_EQ(bytes.piece(3), "\uFF5Cb");  // a name, not bytes: kept, but no text leads there
  EXPECT_EQ(bytes.find("\uFF5Cb"), -1);
  EXPECT_EQ(bytes.find("a b"), -1);
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(Vocabulary({byte_character(byte)}, "x").in_bytes().piece(0), std::string(1, static_cast<char>(byte)));
  }
}

}  // namespace
}  // namespace vesper

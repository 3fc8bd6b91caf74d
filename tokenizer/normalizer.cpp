#include "tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

#include "engine/core/error.h"
#include "tokenizer/utf8.h"

namespace vesper {
namespace {

// Ours: a text may become this many times as long, and a short one this long. Marks for spaces and NFC make three bytes
// of one at most; a chain of hostile replacements would make as many as memory holds, and more.
constexpr std::size_t kMaxGrowth = 8;
constexpr std::size_t kMaxShortBytes = std::size_t{64} << 10U;

// First and last of the characters that normalisation touches and Unicode 9.0 does not have, up to Unicode 15.0:
// combining marks (DerivedAge.txt, DerivedCombiningClass.txt), and U+11930 and U+11938, which compose.
constexpr std::array<std::array<std::uint32_t, 2>, 38> kNewerThanUnicode9 = {{
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
    {0xA82C, 0xA82C},   {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50},
    {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0},
    {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45},
    {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136},
    {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
}};

bool is_newer_than_unicode9(std::uint32_t code) {
  const auto* const range = std::partition_point(kNewerThanUnicode9.begin(), kNewerThanUnicode9.end(),
                                                 [&](const auto& ends) { return ends[1] < code; });
  return range != kNewerThanUnicode9.end() && (*range)[0] <= code;
}

int combining_class(utf8proc_int32_t code) {
  return utf8proc_get_property(code)->combining_class;
}

// Canonical decomposition in canonical order. utf8proc would sort runs of combining marks by insertion, which a hostile
// text makes quadratic.
std::vector<utf8proc_int32_t> decompose(std::string_view text) {
  std::vector<utf8proc_int32_t> codes;
  codes.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t bytes = utf8_step(text, at).bytes;
    const auto code = static_cast<utf8proc_int32_t>(utf8_code(text.substr(at, bytes)));
    at += bytes;
    std::array<utf8proc_int32_t, 8> parts;  // the longest canonical decomposition has 4 code points
    int boundary = 0;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(code, parts.data(), parts.size(), UTF8PROC_DECOMPOSE, &boundary);
    if (count < 0 || static_cast<std::size_t>(count) > parts.size()) {
      fail({"normalising a text", utf8proc_errmsg(count), "its decomposition", ""});
    }
    codes.insert(codes.end(), parts.begin(), parts.begin() + count);
  }
  const auto is_mark = [](utf8proc_int32_t code) { return combining_class(code) != 0; };
  for (auto run = std::find_if(codes.begin(), codes.end(), is_mark); run != codes.end();) {
    const auto end = std::find_if_not(run, codes.end(), is_mark);
    std::stable_sort(run, end, [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    run = std::find_if(end, codes.end(), is_mark);
  }
  return codes;
}

// Appends the form C of `text`, in which is nothing newer than Unicode 9.0.
void append_nfc(std::string_view text, std::string& out) {
  std::vector<utf8proc_int32_t> codes = decompose(text);
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
  const utf8proc_ssize_t count =
      utf8proc_normalize_utf32(codes.data(), static_cast<utf8proc_ssize_t>(codes.size()), options);
  if (count < 0) fail({"normalising a text", utf8proc_errmsg(count), "its composition", ""});
  for (utf8proc_ssize_t i = 0; i < count; ++i) {
    std::array<utf8proc_uint8_t, 4> bytes;
    const utf8proc_ssize_t length = utf8proc_encode_char(codes[static_cast<std::size_t>(i)], bytes.data());
    out.append(bytes.begin(), bytes.begin() + length);
  }
}

void check_growth(std::size_t bytes, std::size_t most) {
  if (bytes <= most) return;
  refuse({"normalising a text", "a normalizer or decoder that makes it longer and longer",
          "at most " + std::to_string(most) + " bytes of it", "this tokenizer is not supported"});
}

std::string replace_all(const std::string& text, const std::string& from, const std::string& to, std::size_t most) {
  std::string out;
  std::size_t done = 0;
  for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, done)) {
    out.append(text, done, at - done);
    check_growth(out.size() + to.size(), most);
    out += to;
    done = at + from.size();
  }
  return out.append(text, done, std::string::npos);
}

std::string normalize_part(const NormalizerStep& step, const std::string& text, std::size_t most) {
  return step.kind == NormalizerStep::Kind::kNfc ? to_nfc(text) : replace_all(text, step.from, step.to, most);
}

}  // namespace

std::string to_nfc(const std::string& text) {
  const auto is_ascii = [](char c) { return static_cast<unsigned char>(c) < 0x80; };
  if (std::all_of(text.begin(), text.end(), is_ascii)) return text;
  std::string out;
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::string_view character = std::string_view(text).substr(at, utf8_step(text, at).bytes);
    if (is_newer_than_unicode9(utf8_code(character))) {
      append_nfc(std::string_view(text).substr(done, at - done), out);
      out += character;
      done = at + character.size();
    }
    at += character.size();
  }
  append_nfc(std::string_view(text).substr(done), out);
  return out;
}

MarkedText normalize(const std::vector<NormalizerStep>& steps, MarkedText text) {
  const std::size_t most = std::max(text.text.size() * kMaxGrowth, kMaxShortBytes);
  for (const NormalizerStep& step : steps) {
    if (step.kind == NormalizerStep::Kind::kPrepend) {
      if (text.text.empty()) continue;
      check_growth(text.text.size() + step.to.size(), most);
      text.text.insert(0, step.to);
      for (TextRange& range : text.plain) range = {range.begin + step.to.size(), range.end + step.to.size()};
      continue;
    }
    MarkedText done;
    std::size_t at = 0;
    for (const TextRange& range : text.plain) {
      done.text += normalize_part(step, text.text.substr(at, range.begin - at), most);
      const std::size_t begin = done.text.size();
      done.text += normalize_part(step, text.text.substr(range.begin, range.end - range.begin), most);
      done.plain.push_back({begin, done.text.size()});
      at = range.end;
    }
    done.text += normalize_part(step, text.text.substr(at), most);
    check_growth(done.text.size(), most);
    text = std::move(done);
  }
  return text;
}

}  // namespace vesper

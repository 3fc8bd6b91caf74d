#include "tokenizer/tokenizer_json.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/bpe_tokenizer.h"
#include "tokenizer/utf8.h"
#include "tokenizer/vocab_and_merges.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

// One of the document's parts: an object whose keys are known, read under the name of where it stands.
class Part {
 public:
  Part(const Json& object, std::string where, const std::string& source)
      : object_(&object), where_(std::move(where)), source_(&source) {
    if (!object.is_object()) wrong(in_quotes(object.dump()), "an object");
  }

  // Also the name that refusals give: a feature's.
  [[nodiscard]] std::string type() const {
    const Json* value = find("type");
    if (value == nullptr || !value->is_string()) wrong("no type", "a type");
    return value->get<std::string>();
  }
  [[nodiscard]] const Json* find(const char* key) const {  // null: absent, or a null
    const auto found = object_->find(key);
    return found == object_->end() || found->is_null() ? nullptr : &*found;
  }
  [[nodiscard]] bool flag(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) wrong(in_quotes(value->dump()) + " for " + key, "true or false");
    return value->get<bool>();
  }
  [[nodiscard]] std::string text(const char* key, const char* otherwise = nullptr) const {
    const Json* value = find(key);
    if (value == nullptr && otherwise != nullptr) return otherwise;
    if (value == nullptr || !value->is_string()) wrong(std::string("no text for ") + key, "one");
    return value->get<std::string>();
  }
  [[nodiscard]] const Json& list(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_array()) wrong(std::string("no list of ") + key, "one");
    return *value;
  }
  [[nodiscard]] Part part(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr) wrong("no " + in_quotes(key), "one");
    return {*value, key, *source_};
  }
  void only_keys(std::initializer_list<std::string_view> known) const {
    for (const auto& [key, value] : object_->items()) {
      if (std::find(known.begin(), known.end(), key) == known.end()) unsupported("the setting " + in_quotes(key));
    }
  }
  [[noreturn]] void unsupported(const std::string& what, const std::string& expected = "what is supported") const {
    refuse({"reading the " + where_ + " of " + *source_, what, expected, "this tokenizer is not supported"});
  }
  [[noreturn]] void wrong(const std::string& found, const std::string& expected) const {
    refuse({"reading the " + where_ + " of " + *source_, found, expected, "copy or download the file again"});
  }
  [[nodiscard]] const std::string& source() const { return *source_; }
  [[nodiscard]] const std::string& where() const { return where_; }

 private:
  const Json* object_;
  std::string where_;
  const std::string* source_;
};

// {"String": ...} or {"Regex": ...}
struct Pattern {
  std::string text;
  bool regex;
};

Pattern read_pattern(const Part& part) {
  const Part pattern = part.part("pattern");
  pattern.only_keys({"String", "Regex"});
  if (pattern.find("Regex") != nullptr) return {pattern.text("Regex"), true};
  return {pattern.text("String"), false};
}

NormalizerStep read_replace(const Part& part) {
  part.only_keys({"type", "pattern", "content"});
  Pattern pattern = read_pattern(part);
  if (pattern.regex) part.unsupported("a Replace with a Regex", "one with a String");
  if (pattern.text.empty()) part.wrong("a Replace of nothing", "some text");
  return {NormalizerStep::Kind::kReplace, std::move(pattern.text), part.text("content")};
}

void read_normalizer(const Part& part, std::vector<NormalizerStep>& steps) {
  const std::string type = part.type();
  if (type == "NFC") {
    steps.push_back({NormalizerStep::Kind::kNfc, "", ""});
  } else if (type == "Prepend") {
    part.only_keys({"type", "prepend"});
    steps.push_back({NormalizerStep::Kind::kPrepend, "", part.text("prepend")});
  } else if (type == "Replace") {
    steps.push_back(read_replace(part));
  } else if (type == "Sequence") {
    for (const Json& step : part.list("normalizers")) read_normalizer({step, part.where(), part.source()}, steps);
  } else {
    part.unsupported(in_quotes(type), "NFC, Prepend, Replace or Sequence");
  }
}

Metaspace read_metaspace(const Part& part) {
  part.only_keys({"type", "replacement", "prepend_scheme", "add_prefix_space", "split", "str_rep"});
  Metaspace metaspace;
  metaspace.mark = part.text("replacement");
  if (metaspace.mark.empty() || utf8_step(metaspace.mark, 0).bytes != metaspace.mark.size()) {
    part.wrong("the replacement " + in_quotes(metaspace.mark), "one character");
  }
  metaspace.split = part.flag("split", true);
  const std::string scheme = part.text("prepend_scheme", part.flag("add_prefix_space", true) ? "always" : "never");
  if (scheme == "always") {
    metaspace.prepend = Metaspace::Prepend::kAlways;
  } else if (scheme == "first") {
    metaspace.prepend = Metaspace::Prepend::kFirst;
  } else if (scheme == "never") {
    metaspace.prepend = Metaspace::Prepend::kNever;
  } else {
    part.unsupported("the prepend_scheme " + in_quotes(scheme), "always, first or never");
  }
  return metaspace;
}

// Fills splits and metaspace. Whether words are bytes from here on.
bool read_pre_tokenizer(const Part& part, BpeTokenizerParts& parts) {
  const std::string type = part.type();
  if (type == "Split") {
    part.only_keys({"type", "pattern", "behavior", "invert"});
    if (const std::string behavior = part.text("behavior"); behavior != "Isolated" || part.flag("invert", false)) {
      part.unsupported(
          "a Split with behavior " + in_quotes(behavior) + (part.flag("invert", false) ? ", inverted" : ""),
          "\"Isolated\", not inverted");
    }
    const Pattern pattern = read_pattern(part);
    parts.splits.push_back(pattern.regex ? SplitPattern(pattern.text, part.source())
                                         : SplitPattern::literal(pattern.text, part.source()));
    return false;
  }
  if (type == "ByteLevel") {
    part.only_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    if (part.flag("add_prefix_space", true)) part.unsupported("a ByteLevel with add_prefix_space", "one without");
    if (part.flag("use_regex", true)) parts.splits.emplace_back(kGpt2Pattern, part.source());
    return true;
  }
  if (type == "Metaspace") {
    if (!parts.metaspace.mark.empty() || !parts.splits.empty()) {
      part.unsupported("a Metaspace behind another step", "one that stands first");
    }
    parts.metaspace = read_metaspace(part);
    return false;
  }
  if (type == "Sequence") {
    bool bytes = false;
    for (const Json& step : part.list("pretokenizers")) {
      if (bytes) part.unsupported("a step behind ByteLevel", "ByteLevel at the end");
      bytes = read_pre_tokenizer({step, part.where(), part.source()}, parts);
    }
    return bytes;
  }
  part.unsupported(in_quotes(type), "Split, ByteLevel, Metaspace or Sequence");
}

struct Decoding {
  bool bytes = false;
  bool fused = false;
};

void read_decoder(const Part& part, BpeTokenizerParts& parts, Decoding& decoding) {
  const std::string type = part.type();
  if (type == "ByteLevel") {
    decoding.bytes = true;
  } else if (type == "Replace") {
    if (decoding.fused || parts.decode_byte_pieces)
      part.unsupported("a Replace behind other steps", "one that stands first");
    parts.replace.push_back(read_replace(part));
  } else if (type == "ByteFallback") {
    parts.decode_byte_pieces = true;
  } else if (type == "Fuse") {
    decoding.fused = true;
  } else if (type == "Strip") {
    part.only_keys({"type", "content", "start", "stop"});
    const Json* start = part.find("start");
    const Json* stop = part.find("stop");
    const bool one_space =
        part.text("content") == " " && start != nullptr && *start == 1 && stop != nullptr && *stop == 0;
    if (!one_space || !decoding.fused)
      part.unsupported("a Strip of something else", "one of one space at the text's start");
    parts.strip_first_space = true;
  } else if (type == "Metaspace") {
    const Metaspace metaspace = read_metaspace(part);
    parts.replace.push_back({NormalizerStep::Kind::kReplace, metaspace.mark, " "});
    parts.strip_first_space = metaspace.prepend != Metaspace::Prepend::kNever;
  } else if (type == "Sequence") {
    for (const Json& step : part.list("decoders")) read_decoder({step, part.where(), part.source()}, parts, decoding);
  } else {
    part.unsupported(in_quotes(type), "ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace or Sequence");
  }
}

// The id that goes before a text, -1: none.
int read_post_processor(const Part& part) {
  const std::string type = part.type();
  if (type == "ByteLevel") return -1;  // moves offsets only
  if (type == "Sequence") {
    int id = -1;
    for (const Json& step : part.list("processors")) {
      const int found = read_post_processor({step, part.where(), part.source()});
      if (found >= 0 && id >= 0) part.unsupported("two templates", "one");
      id = std::max(id, found);
    }
    return id;
  }
  if (type != "TemplateProcessing") part.unsupported(in_quotes(type), "TemplateProcessing, ByteLevel or Sequence");
  const Json& single = part.list("single");
  std::vector<std::string> before;
  bool text_seen = false;
  for (const Json& piece : single) {
    const Part entry(piece, part.where() + ".single", part.source());
    if (entry.find("Sequence") != nullptr) {
      if (text_seen) part.unsupported("a template with the text twice", "once");
      text_seen = true;
    } else {
      before.push_back(entry.part("SpecialToken").text("id"));
      if (text_seen)
        part.unsupported("a template that puts " + in_quotes(before.back()) + " behind the text", "tokens before it");
    }
  }
  if (!text_seen || before.size() > 1) {
    part.unsupported("a template of " + std::to_string(single.size()) + " parts", "one token before the text, or none");
  }
  if (before.empty()) return -1;
  const Json& ids = part.part("special_tokens").part(before[0].c_str()).list("ids");
  if (ids.size() != 1 || !ids[0].is_number_integer() || ids[0] < 0 || ids[0] >= kMaxVocab) {
    part.unsupported("the ids " + in_quotes(ids.dump()) + " of " + in_quotes(before[0]), "one id");
  }
  return ids[0].get<int>();
}

std::vector<Merge> read_merges(const Part& model, const Vocabulary& vocabulary) {
  MergeList merges(vocabulary, model.source());
  for (const Json& entry : model.list("merges")) {
    if (entry.is_string()) {
      merges.add_line(entry.get_ref<const std::string&>());
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
      merges.add(entry[0].get_ref<const std::string&>(), entry[1].get_ref<const std::string&>());
    } else {
      model.wrong("the merge " + in_quotes(entry.dump()), "two pieces");
    }
  }
  return std::move(merges).take();
}

BpeOptions read_options(const Part& model, const Vocabulary& vocabulary) {
  model.only_keys({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                   "byte_fallback", "ignore_merges", "vocab", "merges"});
  if (const Json* dropout = model.find("dropout"); dropout != nullptr && *dropout != 0.0) model.unsupported("dropout");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.text(key, "").empty()) model.unsupported(std::string("a ") + key);
  }
  BpeOptions options;
  options.fuse_unk = model.flag("fuse_unk", false);
  options.byte_fallback = model.flag("byte_fallback", false);
  options.ignore_merges = model.flag("ignore_merges", false);
  if (model.find("unk_token") != nullptr) {
    options.unk_id = vocabulary.find(model.text("unk_token"));
    if (options.unk_id < 0)
      model.wrong("the unk_token " + in_quotes(model.text("unk_token")), "a piece of the vocabulary");
  }
  return options;
}

std::vector<AddedToken> read_added_tokens(const Part& document) {
  std::vector<AddedToken> tokens;
  if (document.find("added_tokens") == nullptr) return tokens;
  for (const Json& entry : document.list("added_tokens")) {
    AddedToken token = read_added_token(entry, document.source());
    const auto id = entry.find("id");
    if (id == entry.end() || !id->is_number_integer() || *id < 0 || *id >= kMaxVocab) {
      document.wrong("the added token " + in_quotes(token.content) + " without an id in range", "one");
    }
    token.id = id->get<int>();
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// BOS: its name from the folder, whether it is added from there too, else both from the post-processor.
void read_bos(const Part& document, const Vocabulary& vocabulary, const TokenizerFolder& folder,
              BpeTokenizerParts& parts) {
  parts.bos_id = named_token(folder.bos, "bos_token", vocabulary, parts.added, folder);
  parts.eos_id = named_token(folder.eos, "eos_token", vocabulary, parts.added, folder);
  if (!folder.adds_bos && document.find("post_processor") != nullptr) {
    const Part part = document.part("post_processor");
    const int before = read_post_processor(part);
    if (before >= vocabulary.size() &&
        std::ranges::none_of(parts.added, [&](const AddedToken& token) { return token.id == before; })) {
      part.wrong("a template that puts the token " + std::to_string(before) + " before the text",
                 "one of the vocabulary or of added_tokens");
    }
    if (parts.bos_id < 0) parts.bos_id = before;
    if (before >= 0 && before != parts.bos_id) {
      part.unsupported("a template that puts the token " + std::to_string(before) + " before the text",
                       "bos_token, " + std::to_string(parts.bos_id));
    }
    parts.adds_bos = before >= 0;
  } else {
    parts.adds_bos = folder.adds_bos.value_or(false) && parts.bos_id >= 0;
  }
}

}  // namespace

std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text, const std::string& path,
                                                const TokenizerFolder& folder) {
  const Json json = parse_json(text, path);
  const Part document(json, "document", path);
  const Part model = document.part("model");
  if (model.find("type") != nullptr && model.type() != "BPE") model.unsupported(in_quotes(model.type()), "\"BPE\"");

  BpeTokenizerParts parts;
  parts.path = path;
  parts.unread = folder.unread;
  if (model.find("vocab") == nullptr) model.wrong("no vocab", "one");
  Vocabulary vocabulary = vocabulary_of_json(*model.find("vocab"), path);
  const std::vector<Merge> merges = read_merges(model, vocabulary);
  BpeOptions options = read_options(model, vocabulary);
  parts.added = place_added_tokens(read_added_tokens(document), vocabulary, folder, path);
  if (document.find("normalizer") != nullptr) read_normalizer(document.part("normalizer"), parts.normalizer);
  if (document.find("pre_tokenizer") != nullptr)
    options.bytes = read_pre_tokenizer(document.part("pre_tokenizer"), parts);
  if (document.find("decoder") == nullptr) document.unsupported("no decoder", "one");
  Decoding decoding;
  read_decoder(document.part("decoder"), parts, decoding);
  if (decoding.bytes != options.bytes ||
      (decoding.bytes && (!parts.replace.empty() || !parts.metaspace.mark.empty()))) {
    document.unsupported("a pre_tokenizer and a decoder of which one is ByteLevel", "both or none");
  }
  read_bos(document, vocabulary, folder, parts);
  parts.format = options.bytes ? "byte-level BPE" : "SentencePiece-style BPE";
  if (options.bytes) vocabulary = std::move(vocabulary).in_bytes();
  return make_bpe_tokenizer(Bpe(std::move(vocabulary), merges, options), std::move(parts));
}

std::unique_ptr<Tokenizer> load_tokenizer_json(const std::string& path, const TokenizerFolder& folder) {
  return parse_tokenizer_json(read_tokenizer_file(path), path, folder);
}

}  // namespace vesper

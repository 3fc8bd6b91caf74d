#include "tokenizer/vocab_and_merges.h"

#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/core/mapped_file.h"
#include "tokenizer/bpe_tokenizer.h"

namespace vesper {
namespace {

// The settings that transformers has in code: models/gpt2 and models/qwen2, tokenization_*.py.
void set_splitting(BpeTokenizerParts& parts, const std::string& source, const TokenizerFolder& folder) {
  std::string_view name = folder.tokenizer_class;
  if (name.ends_with("Fast")) name.remove_suffix(4);
  if (name == "GPT2Tokenizer") {
    parts.splits.emplace_back(kGpt2Pattern, source);
  } else if (name == "Qwen2Tokenizer") {
    parts.normalizer.push_back({NormalizerStep::Kind::kNfc, "", ""});
    parts.splits.emplace_back(kQwen2Pattern, source);
  } else {
    refuse({"reading " + folder.settings,
            folder.tokenizer_class.empty() ? "no tokenizer_class"
                                           : "the tokenizer_class " + in_quotes(folder.tokenizer_class),
            "GPT2Tokenizer or Qwen2Tokenizer, which tells how texts are split before the merges of vocab.json apply",
            "put the model's tokenizer.json into the folder"});
  }
}

}  // namespace

Vocabulary vocabulary_of_json(const nlohmann::json& pieces, const std::string& source) {
  if (!pieces.is_object()) refuse({"reading " + source, "a vocabulary that is no object", "one of pieces and ids", ""});
  std::vector<std::string> by_id;
  by_id.reserve(pieces.size());
  for (const auto& [piece, id] : pieces.items()) {
    if (!id.is_number_integer()) {
      refuse({"reading " + source, in_quotes(id.dump()) + " for the piece " + in_quotes(piece), "an id", ""});
    }
    place_piece(by_id, id.get<std::int64_t>(), piece, source);
  }
  return {std::move(by_id), source};
}

void MergeList::add(std::string_view left, std::string_view right) {
  const auto id_of = [&](std::string_view piece) {
    const int id = vocabulary_.find(piece);
    if (id < 0) {
      refuse({"reading " + source_,
              "the merge of " + in_quotes(left) + " and " + in_quotes(right) + ", where " + in_quotes(piece) +
                  " is no piece of the vocabulary",
              "pieces", "copy or download the files again"});
    }
    return id;
  };
  const int left_id = id_of(left);
  const int right_id = id_of(right);
  merges_.push_back(
      {left_id, right_id, id_of(std::string(left).append(right)), static_cast<std::uint32_t>(merges_.size())});
}

void MergeList::add_line(std::string_view line) {
  const std::size_t space = line.find(' ');
  if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) {
    refuse({"reading " + source_, "the merge " + in_quotes(line), "two pieces with one space between them", ""});
  }
  add(line.substr(0, space), line.substr(space + 1));
}

std::string read_tokenizer_file(const std::string& path) {
  const MappedFile file(path);
  if (file.bytes().size() > kMaxTokenizerBytes) {
    refuse({"reading " + path, std::to_string(file.bytes().size()) + " bytes",
            "at most " + std::to_string(kMaxTokenizerBytes), ""});
  }
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

std::unique_ptr<Tokenizer> load_vocab_and_merges(const std::string& vocab_path, const std::string& merges_path,
                                                 const TokenizerFolder& folder) {
  Vocabulary vocabulary = vocabulary_of_json(parse_json(read_tokenizer_file(vocab_path), vocab_path), vocab_path);
  const std::string lines = read_tokenizer_file(merges_path);
  MergeList merges(vocabulary, merges_path);
  for (std::string_view rest = lines; !rest.empty();) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    if (!line.empty() && !line.starts_with("#version")) merges.add_line(line);
  }

  BpeTokenizerParts parts;
  parts.format = "byte-level BPE";
  parts.path = vocab_path;
  parts.unread = folder.unread;
  set_splitting(parts, vocab_path, folder);
  parts.added = place_added_tokens({}, vocabulary, folder, vocab_path);
  parts.bos_id = named_token(folder.bos, "bos_token", vocabulary, parts.added, folder);
  parts.eos_id = named_token(folder.eos, "eos_token", vocabulary, parts.added, folder);
  parts.adds_bos = folder.adds_bos.value_or(false) && parts.bos_id >= 0;
  BpeOptions options;
  options.bytes = true;
  vocabulary = std::move(vocabulary).in_bytes();
  return make_bpe_tokenizer(Bpe(std::move(vocabulary), std::move(merges).take(), options), std::move(parts));
}

}  // namespace vesper

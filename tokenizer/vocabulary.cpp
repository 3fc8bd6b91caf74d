#include "tokenizer/vocabulary.h"

#include <optional>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/byte_level.h"

namespace vesper {

Vocabulary::Vocabulary(std::vector<std::string> pieces, const std::string& source) : pieces_(std::move(pieces)) {
  ids_.reserve(pieces_.size());
  for (int id = 0; id < size(); ++id) {
    const std::string& text = piece(id);
    if (text.empty()) {
      refuse({"reading " + source, "no piece for the id " + std::to_string(id) + " of " + std::to_string(size()),
              "one for each id from 0 on", "copy or download the file again"});
    }
    if (text.size() > kMaxPieceBytes) {
      refuse({"reading " + source, "a piece of " + std::to_string(text.size()) + " bytes",
              "at most " + std::to_string(kMaxPieceBytes), ""});
    }
    if (const auto [earlier, added] = ids_.emplace(text, id); !added) {
      refuse({"reading " + source,
              "the piece " + in_quotes(text) + " for the ids " + std::to_string(earlier->second) + " and " +
                  std::to_string(id),
              "each piece once", "copy or download the file again"});
    }
  }
}

Vocabulary Vocabulary::in_bytes() && {
  Vocabulary spelled;
  spelled.pieces_ = std::move(pieces_);
  spelled.ids_ = std::move(ids_);
  spelled.ids_.clear();  // its buckets stay
  for (int id = 0; id < spelled.size(); ++id) {
    std::string& text = spelled.pieces_[static_cast<std::size_t>(id)];
    std::optional<std::string> bytes = bytes_of_piece(text);
    if (!bytes) continue;
    text = std::move(*bytes);
    spelled.ids_.emplace(text, id);
  }
  return spelled;
}

int Vocabulary::find(std::string_view piece) const {
  const auto found = ids_.find(piece);
  return found == ids_.end() ? -1 : found->second;
}

void place_piece(std::vector<std::string>& pieces, std::int64_t id, std::string_view piece, const std::string& source) {
  if (id < 0 || id >= kMaxVocab) {
    refuse({"reading " + source, "the id " + std::to_string(id) + " for the piece " + in_quotes(piece),
            "ids from 0 to " + std::to_string(kMaxVocab - 1), "copy or download the file again"});
  }
  if (piece.empty()) {
    refuse({"reading " + source, "an empty piece with the id " + std::to_string(id), "a text for each id", ""});
  }
  const auto at = static_cast<std::size_t>(id);
  if (at >= pieces.size()) pieces.resize(at + 1);
  if (!pieces[at].empty()) {
    refuse({"reading " + source,
            "the id " + std::to_string(id) + " for " + in_quotes(pieces[at]) + " and for " + in_quotes(piece),
            "each id once", "copy or download the file again"});
  }
  pieces[at] = piece;
}

}  // namespace vesper

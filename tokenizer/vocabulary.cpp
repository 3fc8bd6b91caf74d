#include "tokenizer/vocabulary.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <optional>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/byte_level.h"

namespace vesper {
namespace {

std::uint32_t hash_of(std::string_view piece) {
  return static_cast<std::uint32_t>(std::hash<std::string_view>()(piece));
}

}  // namespace

Vocabulary::Vocabulary(std::vector<std::string> pieces, const std::string& source) : pieces_(std::move(pieces)) {
  slots_.resize(std::bit_ceil(pieces_.size() * 2 + 1));
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
    const std::uint32_t hash = hash_of(text);
    Slot& slot = slots_[slot_of(text, hash)];
    if (slot.id >= 0) {
      refuse({"reading " + source,
              "the piece " + in_quotes(text) + " for the ids " + std::to_string(slot.id) + " and " + std::to_string(id),
              "each piece once", "copy or download the file again"});
    }
    slot = {hash, id};
  }
}

Vocabulary Vocabulary::in_bytes() && {
  std::fill(slots_.begin(), slots_.end(), Slot());
  for (int id = 0; id < size(); ++id) {
    std::string& text = pieces_[static_cast<std::size_t>(id)];
    std::optional<std::string> bytes = bytes_of_piece(text);
    if (!bytes) continue;
    text = std::move(*bytes);
    const std::uint32_t hash = hash_of(text);
    slots_[slot_of(text, hash)] = {hash, id};
  }
  return std::move(*this);
}

std::size_t Vocabulary::slot_of(std::string_view piece, std::uint32_t hash) const {
  std::size_t at = hash & (slots_.size() - 1);
  while (slots_[at].id >= 0 && (slots_[at].hash != hash || this->piece(slots_[at].id) != piece)) {
    at = (at + 1) & (slots_.size() - 1);
  }
  return at;
}

int Vocabulary::find(std::string_view piece) const {
  return slots_.empty() ? -1 : slots_[slot_of(piece, hash_of(piece))].id;
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

// Pieces by id and ids by piece.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace vesper {

inline constexpr int kMaxVocab = 1 << 22;            // ours; the largest published vocabularies have 2^18 pieces
inline constexpr std::size_t kMaxPieceBytes = 4096;  // ours; real pieces have at most some hundred
inline constexpr std::size_t kMaxTokenizerBytes = 256U << 20;  // ours, of one file; real ones have at most 35 MB

// An index of one flat table: vocabularies are read for each run, and loading one looks up each piece of each merge.
class Vocabulary {
 public:
  Vocabulary() = default;
  // `pieces[id]`, of which an empty one is an id that nothing was given for. `source` names the file. Throws an input
  // error on a hole, on a piece that two ids have, and on one of over kMaxPieceBytes.
  Vocabulary(std::vector<std::string> pieces, const std::string& source);

  // The pieces as the bytes that they spell in the byte-level alphabet. Those with other characters, as names of tokens
  // may have, keep their text and are not found any more: no text leads to them.
  [[nodiscard]] Vocabulary in_bytes() &&;

  [[nodiscard]] int size() const { return static_cast<int>(pieces_.size()); }
  [[nodiscard]] const std::string& piece(int id) const { return pieces_[static_cast<std::size_t>(id)]; }
  [[nodiscard]] int find(std::string_view piece) const;  // -1: none

 private:
  struct Slot {
    std::uint32_t hash = 0;
    int id = -1;
  };
  // Where `piece` is, or where it would be.
  [[nodiscard]] std::size_t slot_of(std::string_view piece, std::uint32_t hash) const;

  std::vector<std::string> pieces_;
  std::vector<Slot>
      slots_;  // a power of two of them, at most half full; what collides lies behind, the first behind the last
};

// Puts `piece` at `id` of what will become a Vocabulary. Throws an input error that names `source` for an id that is
// out of range or taken, and for an empty piece.
void place_piece(std::vector<std::string>& pieces, std::int64_t id, std::string_view piece, const std::string& source);

}  // namespace vesper

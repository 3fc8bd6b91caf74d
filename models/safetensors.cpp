#include "models/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kLengthBytes = 8;
constexpr std::int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr std::size_t kMaxRank = 8;
constexpr const char* kSoundCopy = "replace the file by a sound copy";

static_assert(std::endian::native == std::endian::little, "tensors are used as they lie in the file");

// The names that we can use. The format has more (F64, I64, BOOL, F8_E4M3, ...); no weight of a model here has them.
constexpr std::array<std::pair<const char*, DType>, 5> kDTypes = {{
    {"F32", DType::kF32},
    {"BF16", DType::kBf16},
    {"F16", DType::kF16},
    {"I32", DType::kI32},
    {"U8", DType::kU8},
}};

// A tensor while the header is being read; offsets count from the end of the header.
struct Entry {
  std::string name;
  StoredTensor tensor;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Turns the header's JSON into entries, each checked by itself.
class HeaderReader {
 public:
  explicit HeaderReader(const std::string& path) : path_(path) {}

  [[nodiscard]] std::vector<Entry> entries(const Json& header) const {
    if (!header.is_object()) {
      refuse({"reading the header of " + path_, std::string("JSON of type ") + header.type_name(), "an object",
              kSoundCopy});
    }
    std::vector<Entry> entries;
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") {
        check_metadata(value);
      } else {
        entries.push_back(entry(name, value));
      }
    }
    return entries;
  }

  [[noreturn]] void refuse_tensor(const std::string& name, const std::string& found,
                                  const std::string& expected) const {
    refuse({"reading " + path_ + ", tensor " + in_quotes(name), found, expected, kSoundCopy});
  }

 private:
  void check_metadata(const Json& value) const {
    const bool strings =
        value.is_object() && std::all_of(value.begin(), value.end(), [](const Json& item) { return item.is_string(); });
    if (!strings) {
      refuse({"reading the header of " + path_ + ", key \"__metadata__\"", "something else", "an object of strings",
              kSoundCopy});
    }
  }

  [[nodiscard]] Entry entry(const std::string& name, const Json& value) const {
    const bool complete = value.is_object() && value.size() == 3 && value.contains("dtype") &&
                          value.contains("shape") && value.contains("data_offsets");
    if (!complete) {
      refuse_tensor(name, "an entry of other contents", "an object of exactly dtype, shape and data_offsets");
    }
    Entry entry;
    entry.name = name;
    entry.tensor.dtype = dtype(name, value["dtype"]);
    entry.tensor.shape = counts(name, "shape", value["shape"]);
    if (entry.tensor.shape.size() > kMaxRank) {
      refuse_tensor(name, "a shape of " + std::to_string(entry.tensor.shape.size()) + " dimensions", "at most 8");
    }
    entry.tensor.bytes = bytes(name, entry.tensor);
    const std::vector<std::int64_t> offsets = counts(name, "data_offsets", value["data_offsets"]);
    if (offsets.size() != 2 || offsets[0] > offsets[1]) {
      refuse_tensor(name, "data_offsets " + text(value["data_offsets"]), "[begin, end] with begin <= end");
    }
    entry.begin = offsets[0];
    entry.end = offsets[1];
    if (entry.end - entry.begin != entry.tensor.bytes) {
      refuse_tensor(name,
                    "data_offsets " + text(value["data_offsets"]) + ", that is " +
                        std::to_string(entry.end - entry.begin) + " bytes",
                    std::to_string(entry.tensor.bytes) + " bytes for " + std::string(dtype_name(entry.tensor.dtype)) +
                        " of shape " + text(value["shape"]));
    }
    return entry;
  }

  [[nodiscard]] DType dtype(const std::string& name, const Json& value) const {
    for (const auto& [known, dtype] : kDTypes) {
      if (value == known) return dtype;
    }
    refuse({"reading " + path_ + ", tensor " + in_quotes(name), "dtype " + text(value), "F32, BF16, F16, I32 or U8",
            "convert the checkpoint to one of these"});
  }

  // An array of exact non-negative integers: 2.0, 1e3, -0 and 2^63 are refused.
  [[nodiscard]] std::vector<std::int64_t> counts(const std::string& name, const std::string& key,
                                                 const Json& value) const {
    std::vector<std::int64_t> numbers;
    bool good = value.is_array();
    for (std::size_t i = 0; good && i < value.size(); ++i) {
      good = value[i].is_number_unsigned() &&
             value[i].get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
      if (good) numbers.push_back(value[i].get<std::int64_t>());
    }
    if (!good) refuse_tensor(name, key + " " + text(value), "an array of non-negative 63-bit integers");
    return numbers;
  }

  [[nodiscard]] std::int64_t bytes(const std::string& name, const StoredTensor& tensor) const {
    std::int64_t product = dtype_bytes(tensor.dtype);
    for (const std::int64_t extent : tensor.shape) {
      if (__builtin_mul_overflow(product, extent, &product)) {
        refuse_tensor(name, "shape " + text(Json(tensor.shape)), "a product that fits in 63 bits");
      }
    }
    return product;
  }

  // A value of the header in a message: short, printable.
  static std::string text(const Json& value) {
    const std::string dumped = value.dump(-1, ' ', true, Json::error_handler_t::replace);
    return dumped.size() <= 100 ? dumped : dumped.substr(0, 100) + "...";
  }

  const std::string& path_;
};

std::string_view header_text(const std::string& path, std::span<const std::byte> file) {
  const auto file_bytes = static_cast<std::int64_t>(file.size());
  if (file_bytes < kLengthBytes) {
    refuse({"reading " + path, "a file of " + std::to_string(file_bytes) + " bytes",
            "a safetensors file, which begins with 8 bytes of header length", kSoundCopy});
  }
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), kLengthBytes);
  if (header_bytes > static_cast<std::uint64_t>(kMaxHeaderBytes)) {
    refuse({"reading " + path, "a header length of " + std::to_string(header_bytes) + " bytes",
            "at most " + std::to_string(kMaxHeaderBytes), "check that this is a safetensors file"});
  }
  if (header_bytes > static_cast<std::uint64_t>(file_bytes - kLengthBytes)) {
    refuse({"reading " + path, "a file of " + std::to_string(file_bytes) + " bytes",
            "at least " + std::to_string(header_bytes + kLengthBytes) + " for its header: it is truncated",
            "download or copy it again"});
  }
  return {reinterpret_cast<const char*>(file.data()) + kLengthBytes, header_bytes};
}

// The tensors in file order, each beginning where the one before ends.
void check_layout(const HeaderReader& reader, std::vector<Entry>& entries) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  const Entry* previous = nullptr;
  for (const Entry& entry : entries) {
    const std::int64_t expected = previous == nullptr ? 0 : previous->end;
    if (entry.begin != expected) {
      const std::string after = previous == nullptr ? "the header" : in_quotes(previous->name);
      reader.refuse_tensor(entry.name,
                           "data that begins at " + std::to_string(entry.begin) +
                               (entry.begin < expected ? ", overlapping " + after : ", leaving a hole after " + after),
                           std::to_string(expected));
    }
    previous = &entry;
  }
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), file_(path) {
  const std::span<const std::byte> file = file_.bytes();
  const std::string_view header = header_text(path, file);
  const HeaderReader reader(path_);
  std::vector<Entry> entries = reader.entries(parse_json(header, "the header of " + path));
  check_layout(reader, entries);

  const std::int64_t data_begin = kLengthBytes + static_cast<std::int64_t>(header.size());
  const std::int64_t found = static_cast<std::int64_t>(file.size()) - data_begin;
  const std::int64_t expected = entries.empty() ? 0 : entries.back().end;
  if (found != expected) {
    refuse(
        {"reading " + path, std::to_string(found) + " bytes of tensors",
         std::to_string(expected) + " as the header says: the file is " + (found < expected ? "truncated" : "padded"),
         "download or copy it again"});
  }
  for (Entry& entry : entries) {
    entry.tensor.data = file.data() + data_begin + entry.begin;
    tensors_.emplace(std::move(entry.name), std::move(entry.tensor));
  }
}

const StoredTensor* SafetensorsFile::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace vesper

// tokenizer.json, in a folder that says nothing else.
#include "tokenizer/tokenizer_json.h"

#include "tests/fuzz/fuzz.h"

namespace vesper {

void fuzz(std::string_view input) {
  use_tokenizer(*parse_tokenizer_json(input, "tokenizer.json", TokenizerFolder()));
}

}  // namespace vesper

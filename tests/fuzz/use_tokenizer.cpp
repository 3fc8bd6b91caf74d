#include <array>

#include "tests/fuzz/fuzz.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

void use_tokenizer(const Tokenizer& tokenizer) {
  // Words, digits, runs of white space, marks to compose, characters of one to four bytes, what may be a special token.
  const std::string text = "<s>It's abc  12345\n\n\t e\u0301\u00e9 \u20ac\u2581x\U0001F600</s> <|eot_id|>";
  const std::array<TextRange, 2> plain = {{{0, 3}, {20, 33}}};
  for (const auto& ids : {tokenizer.encode_prompt(text), tokenizer.encode_with_special(text),
                          tokenizer.encode_with_special(text, plain)}) {
    for (const std::int32_t id : ids)
      promise(id >= 0 && id < tokenizer.vocab(), "an encoder's ids are the vocabulary's");
    const std::string decoded = tokenizer.decode(ids);
    promise(find_invalid_utf8(decoded) < 0, "decoded text is valid UTF-8");
  }
}

}  // namespace vesper

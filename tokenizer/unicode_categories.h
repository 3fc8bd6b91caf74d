// What Unicode says that the regular expression library does not know yet.
//
// PCRE2 10.42 (Debian 12) has the tables of Unicode 14.0. The reference implementations have those of 16.0: Oniguruma
// in Hugging Face's `tokenizers` 0.23.3 and Rust's regex-syntax in tiktoken 0.14.0, compared with it over all code
// points.
#pragma once

#include <string>
#include <string_view>

namespace vesper {

// The characters that Unicode 15.0, 15.1 and 16.0 added to a general category ("Lu", "L"), written as ranges inside a
// class of PCRE2: "\x{10d4a}-\x{10d4f}...". Empty where there are none. A newer PCRE2 has them already: no harm is
// done.
std::string added_since_unicode14(std::string_view category);

}  // namespace vesper

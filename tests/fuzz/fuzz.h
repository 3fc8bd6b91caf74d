// What the fuzz targets share. Each target is one file that defines fuzz(); entry.cpp stands between it and libFuzzer.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace vesper {

class Tokenizer;

// Takes the input as the file that the target is named after. May return or throw an input error; anything else that
// ends it is a finding.
void fuzz(std::string_view input);

// What the code promises of an input that it takes; a promise broken is a finding.
void promise(bool kept, const char* what);

// A folder of this process, under TMPDIR; configs/scripts/fuzz.sh has that in memory and removes it.
const std::string& scratch_folder();

// Writes FOLDER/name anew and gives its path.
std::string scratch_file(const std::string& name, std::string_view content);

// Encodes a short text in all ways and decodes what comes out.
void use_tokenizer(const Tokenizer& tokenizer);

}  // namespace vesper

// Needle questions made from a text, in the demo model's format, and answered by greedy decoding: values hidden at
// random depths among the text's words, asked for at the end.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/eval_needle.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

// A text as words; a line break of the text is kept, in front of the word that follows it.
struct Haystack {
  struct Word {
    std::string text;
    bool starts_line = false;
  };
  std::vector<Word> words;
  // Lower-case words of the text, of at least four letters, that are one token each: what keys and values are made of,
  // as in the demo model's training. Sorted, unique.
  std::vector<std::string> common;
};

// Throws an input error for a text with too few common words. `source` names it.
Haystack make_haystack(const Tokenizer& tokenizer, const std::string& text, const std::string& source);

struct NeedleQuestion {
  std::string key;
  std::string value;
  std::string text;    // the question, up to where the answer begins
  double depth = 0.0;  // share of the prompt's words before the needle
};

struct NeedlePrompt {
  NeedleKind kind = NeedleKind::kWords;
  std::string text;  // with the needles of all questions in it
  std::vector<NeedleQuestion> questions;
};

struct NeedlePromptOptions {
  int context = 0;    // tokens that prompt, one question and its answer may take together
  int questions = 0;  // in all; four a text at most. Texts alternate between words and numbers
  std::uint32_t seed = 0;
};

// Every prompt holds as many of the text's words as fit, from a random word on. Throws an input error where the text or
// the context is too short.
std::vector<NeedlePrompt> make_needle_prompts(const Tokenizer& tokenizer, const Haystack& haystack,
                                              const NeedlePromptOptions& options);

struct NeedleAnswer {
  NeedleKind kind = NeedleKind::kWords;
  NeedleQuestion question;
  std::string answer;  // what greedy decoding wrote
  bool right = false;  // it begins with the value
};

struct NeedleAnswers {
  std::vector<NeedleAnswer> answers;
  NeedleScore score;
};

// Prefills each text once, as far as it fills whole pages, then feeds the rest with each of its questions through
// decode and goes on greedily for as many tokens as the value has, rewinding the sequence between questions. `progress`
// counts the tokens of the texts.
NeedleAnswers eval_needle_prompts(Engine& engine, const Tokenizer& tokenizer, std::span<const NeedlePrompt> prompts,
                                  const Progress& progress);

}  // namespace vesper

// vesper tokenize: text to ids, ids to text.
#include <fmt/format.h>

#include <string>
#include <vector>

#include "apps/options.h"
#include "apps/prompts.h"
#include "engine/core/error.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

struct TokenizeOptions {
  std::string model;
  std::string text;
  std::string file;
  std::string jsonl;
  std::string decode;
  bool special = false;
  bool bos = false;
};

std::string line_of_ids(const Tokenizer& tokenizer, const std::string& text, const TokenizeOptions& options) {
  std::vector<std::int32_t> ids = options.special ? tokenizer.encode_with_special(text) : tokenizer.encode(text);
  if (options.bos) ids.insert(ids.begin(), tokenizer.bos_id());
  return fmt::format("{}\n", fmt::join(ids, " "));
}

int run_tokenize(const CLI::App& app, const TokenizeOptions& options) {
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(options.model);
  if (app.count("--decode") > 0) {
    fmt::print("{}", tokenizer->decode(parse_ids(options.decode, "--decode")));
    return 0;
  }
  if (options.bos && tokenizer->bos_id() < 0) {
    refuse({"adding --bos", "a tokenizer without a BOS token", "one with", "leave --bos out"});
  }
  std::vector<std::string> texts;
  if (app.count("--jsonl") > 0) {
    PromptSources source;
    source.prompts_jsonl = options.jsonl;
    texts = read_prompts(source);
  } else if (app.count("--text") > 0) {
    check_utf8(options.text, "--text");
    texts = {options.text};
  } else {
    texts = {read_text(app.count("--file") > 0 ? options.file : "-")};
  }
  for (const std::string& text : texts) fmt::print("{}", line_of_ids(*tokenizer, text, options));
  return 0;
}

}  // namespace

Command make_tokenize(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "tokenize",
      "Text to token ids, separated by spaces on one line; or ids to text. Needs only the tokenizer's files.");
  app->footer(
      "Examples:\n"
      "  vesper tokenize --model configs/demo --text \"a dark night\" --bos\n"
      "  vesper tokenize --model configs/demo < book.txt\n"
      "  vesper tokenize --model configs/demo --jsonl texts.jsonl      a line each\n"
      "  vesper tokenize --model configs/demo --decode \"1 2 3\"      no newline is added");
  auto options = std::make_shared<TokenizeOptions>();
  app->add_option("--model", options->model, "Folder that holds a tokenizer")
      ->required()
      ->type_name("DIR")
      ->group(kModelFlags);
  auto* text = app->add_option("--text", options->text, "Text to encode")->type_name("TEXT")->group(kInputFlags);
  auto* file =
      app->add_option("--file", options->file, "File to encode; without it, --text and --decode, stdin is read")
          ->check(some_text())
          ->type_name("FILE")
          ->group(kInputFlags);
  auto* jsonl = app->add_option("--jsonl", options->jsonl,
                                "File with one text a line, each a JSON string; each gives a line of ids")
                    ->check(some_text())
                    ->type_name("FILE")
                    ->group(kInputFlags);
  auto* decode = app->add_option("--decode", options->decode, "Ids to decode, separated by spaces")
                     ->type_name("IDS")
                     ->group(kInputFlags);
  auto* special =
      app->add_flag("--special", options->special,
                    "The names of special tokens in the text become their ids, as in what chat templates write")
          ->group(kInputFlags);
  auto* bos = app->add_flag("--bos", options->bos, "Put the beginning-of-sequence id first")->group(kOutputFlags);
  text->excludes(file)->excludes(jsonl)->excludes(decode);
  file->excludes(jsonl)->excludes(decode);
  jsonl->excludes(decode);
  decode->excludes(bos)->excludes(special);
  return Command{app, [app, options] { return run_tokenize(*app, *options); }};
}

}  // namespace vesper

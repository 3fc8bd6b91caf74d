// vesper tokenize: text to ids, ids to text.
#include <fmt/format.h>

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
  std::string decode;
  bool bos = false;
};

int run_tokenize(const CLI::App& app, const TokenizeOptions& options) {
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(options.model);
  if (app.count("--decode") > 0) {
    fmt::print("{}", tokenizer->decode(parse_ids(options.decode, "--decode")));
    return 0;
  }
  std::string text = options.text;
  if (app.count("--text") > 0) {
    check_utf8(text, "--text");
  } else {
    text = read_text(app.count("--file") > 0 ? options.file : "-");
  }
  std::string line;
  if (options.bos) {
    if (tokenizer->bos_id() < 0) {
      refuse({"adding --bos", "a tokenizer without a BOS token", "one with", "leave --bos out"});
    }
    line = std::to_string(tokenizer->bos_id());
  }
  for (const std::int32_t id : tokenizer->encode(text)) line += (line.empty() ? "" : " ") + std::to_string(id);
  fmt::print("{}\n", line);
  return 0;
}

}  // namespace

Command make_tokenize(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "tokenize", "Text to token ids, separated by spaces on one line; or ids to text. Needs only tokenizer.model.");
  app->footer(
      "Examples:\n"
      "  vesper tokenize --model configs/demo --text \"a dark night\" --bos\n"
      "  vesper tokenize --model configs/demo < book.txt\n"
      "  vesper tokenize --model configs/demo --decode \"1 2 3\"      no newline is added");
  auto options = std::make_shared<TokenizeOptions>();
  app->add_option("--model", options->model, "Folder that holds tokenizer.model")
      ->required()
      ->type_name("DIR")
      ->group(kModelFlags);
  auto* text = app->add_option("--text", options->text, "Text to encode")->type_name("TEXT")->group(kInputFlags);
  auto* file =
      app->add_option("--file", options->file, "File to encode; without it, --text and --decode, stdin is read")
          ->check(some_text())
          ->type_name("FILE")
          ->group(kInputFlags);
  auto* decode = app->add_option("--decode", options->decode, "Ids to decode, separated by spaces")
                     ->type_name("IDS")
                     ->group(kInputFlags);
  auto* bos = app->add_flag("--bos", options->bos, "Put the beginning-of-sequence id first")->group(kOutputFlags);
  text->excludes(file)->excludes(decode);
  file->excludes(decode);
  decode->excludes(bos);
  return Command{app, [app, options] { return run_tokenize(*app, *options); }};
}

}  // namespace vesper

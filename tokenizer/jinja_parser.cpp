// Statements; the grammar is that of jinja2 3.1, parser.py.
#include "tokenizer/jinja_parser.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "engine/core/json.h"
#include "tokenizer/jinja_expressions.h"
#include "tokenizer/jinja_token_reader.h"

namespace vesper::jinja {
namespace {

using Names = std::initializer_list<std::string_view>;
using Level = TokenReader::Level;

class Parser {
 public:
  Parser(std::vector<Token> tokens, const std::string& name) : reader_(std::move(tokens), name) {}

  Program run() {
    program_.statements = statements({});
    return std::move(program_);
  }

 private:
  // Up to a block that begins with one of `ends`, which stays to be read from its name on; without any, up to the end
  // of the template.
  std::vector<Statement> statements(Names ends) {
    const Level level(reader_);
    std::vector<Statement> body;
    while (true) {
      switch (reader_.token().kind) {
        case TokenKind::kEnd:
          if (ends.size() == 0) return body;
          reader_.unexpected("{% " + std::string(*(ends.end() - 1)) + " %}");
        case TokenKind::kData:
          body.push_back(begin(StatementKind::kText));
          body.back().text = ChatText::of_template(reader_.next().text);
          break;
        case TokenKind::kVariableBegin: {
          reader_.next();
          Statement print = begin(StatementKind::kPrint);
          print.value = parse_tuple(reader_, program_);
          reader_.expect(TokenKind::kVariableEnd, "\"}}\"");
          body.push_back(std::move(print));
          break;
        }
        default:
          reader_.expect(TokenKind::kBlockBegin, "a tag");
          if (std::any_of(ends.begin(), ends.end(), [this](std::string_view end) { return reader_.is_name(end); }))
            return body;
          body.push_back(statement());
      }
    }
  }

  [[nodiscard]] Statement begin(StatementKind kind) const {
    Statement statement;
    statement.kind = kind;
    statement.line = reader_.token().line;
    return statement;
  }

  void end_block() { reader_.expect(TokenKind::kBlockEnd, "\"%}\""); }

  std::vector<Statement> body_until(std::string_view end) {
    end_block();
    std::vector<Statement> body = statements({end});
    reader_.expect_name(end);
    end_block();
    return body;
  }

  Statement statement() {
    if (reader_.is_name("set")) return set_statement();
    if (reader_.is_name("for")) return for_statement();
    if (reader_.is_name("if")) return if_statement();
    if (reader_.is_name("macro")) return macro_statement();
    if (reader_.is_name("generation")) {
      Statement block = begin(StatementKind::kBlock);
      reader_.next();
      block.body = body_until("endgeneration");
      return block;
    }
    if (reader_.is_name("break") || reader_.is_name("continue")) {
      if (loops_ == 0) reader_.unexpected("it inside of a for");
      Statement jump = begin(reader_.is_name("break") ? StatementKind::kBreak : StatementKind::kContinue);
      reader_.next();
      end_block();
      return jump;
    }
    if (reader_.token().kind != TokenKind::kName) reader_.unexpected("a statement");
    reader_.stop("the statement " + in_quotes(reader_.token().text),
                 "one of: set, for, if, macro, generation, break, continue, or the end of one that is open");
  }

  void targets(Statement& statement, bool with_attributes) {
    const bool brackets = reader_.skip_operator("(");
    do {
      if (statement.unpacks && reader_.token().kind != TokenKind::kName) break;  // a comma at the end
      Target target{reader_.variable_name(), ""};
      if (with_attributes && reader_.skip_operator(".")) target.attribute = reader_.variable_name();
      statement.targets.push_back(target);
      if (reader_.is_operator(",")) statement.unpacks = true;
    } while (reader_.skip_operator(","));
    if (brackets) reader_.expect_operator(")");
  }

  Statement set_statement() {
    Statement set = begin(StatementKind::kSet);
    reader_.next();
    targets(set, /*with_attributes=*/true);
    if (reader_.skip_operator("=")) {
      set.value = parse_tuple(reader_, program_);
      end_block();
      return set;
    }
    if (set.unpacks || reader_.is_operator("|")) reader_.unexpected("\"=\"");
    set.kind = StatementKind::kSetBlock;
    set.body = body_until("endset");
    return set;
  }

  Statement for_statement() {
    Statement loop = begin(StatementKind::kFor);
    reader_.next();
    targets(loop, /*with_attributes=*/false);
    reader_.expect_name("in");
    loop.value = parse_tuple(reader_, program_, /*with_choice=*/false);
    if (reader_.skip_name("if")) loop.condition = parse_expression(reader_, program_);
    if (reader_.is_name("recursive")) reader_.stop("a recursive for", "one without");
    end_block();
    ++loops_;
    loop.body = statements({"else", "endfor"});
    --loops_;
    if (reader_.skip_name("else")) {
      end_block();
      loop.otherwise = statements({"endfor"});
    }
    reader_.expect_name("endfor");
    end_block();
    return loop;
  }

  Statement if_statement() {
    Statement choice = begin(StatementKind::kIf);
    do {
      reader_.next();  // if, elif
      const Expr* condition = parse_tuple(reader_, program_, /*with_choice=*/false);
      end_block();
      choice.branches.emplace_back(condition, statements({"elif", "else", "endif"}));
    } while (reader_.is_name("elif"));
    if (reader_.skip_name("else")) {
      end_block();
      choice.otherwise = statements({"endif"});
    }
    reader_.expect_name("endif");
    end_block();
    return choice;
  }

  Statement macro_statement() {
    Statement macro = begin(StatementKind::kMacro);
    reader_.next();
    macro.text = ChatText::of_template(reader_.variable_name());
    reader_.expect_operator("(");
    while (!reader_.skip_operator(")")) {
      if (!macro.parameters.empty()) reader_.expect_operator(",");
      const std::string name = reader_.variable_name();
      const bool has_default = reader_.skip_operator("=");
      if (!has_default && !macro.parameters.empty() && macro.parameters.back().second != nullptr) {
        reader_.unexpected("a default for " + in_quotes(name) + ", as for the parameter before it");
      }
      macro.parameters.emplace_back(name, has_default ? parse_expression(reader_, program_) : nullptr);
    }
    const int loops = std::exchange(loops_, 0);
    macro.body = body_until("endmacro");
    loops_ = loops;
    return macro;
  }

  TokenReader reader_;
  int loops_ = 0;  // for statements around this place
  Program program_;
};

}  // namespace

Program parse(std::string_view source, const std::string& name) {
  return Parser(tokenize(source, name), name).run();
}

}  // namespace vesper::jinja

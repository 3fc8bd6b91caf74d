#include "tokenizer/jinja_call.h"

#include <algorithm>

#include "engine/core/json.h"

namespace vesper::jinja {

Bound bound_arguments(const Rendering& rendering, const std::string& what, const Arguments& arguments,
                      const Parameters& parameters) {
  Bound bound{};
  const auto count = static_cast<std::size_t>(
      std::count_if(parameters.begin(), parameters.end(), [](std::string_view name) { return !name.empty(); }));
  if (arguments.positional.size() > count) {
    rendering.stop(std::to_string(arguments.positional.size()) + " arguments to " + what,
                   "at most " + std::to_string(count));
  }
  for (std::size_t i = 0; i < arguments.positional.size(); ++i) bound[i] = &arguments.positional[i];
  for (const auto& [name, value] : arguments.named) {
    const auto found = std::find(parameters.begin(), parameters.begin() + static_cast<std::ptrdiff_t>(count), name);
    const auto at = static_cast<std::size_t>(found - parameters.begin());
    if (at == count || bound[at] != nullptr) {
      rendering.stop("the argument " + in_quotes(name) + " to " + what, "arguments that it knows, each once");
    }
    bound[at] = &value;
  }
  return bound;
}

void refuse_unknown(const Rendering& rendering, const std::string& kind, std::string_view name,
                    const std::vector<std::string_view>& known) {
  std::string list;
  for (const std::string_view one : known) list += (list.empty() ? "" : ", ") + std::string(one);
  rendering.stop("the " + kind + " " + in_quotes(name), "one of: " + list);
}

}  // namespace vesper::jinja

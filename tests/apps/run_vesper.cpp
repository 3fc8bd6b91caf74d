#include "tests/apps/run_vesper.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstring>

namespace vesper {
namespace {

using Clock = std::chrono::steady_clock;

// Both ends of a pipe; each is closed once.
class Pipe {
 public:
  Pipe() {
    if (pipe2(ends_.data(), O_CLOEXEC) != 0) std::abort();
  }
  ~Pipe() {
    close_end(0);
    close_end(1);
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  Pipe(Pipe&&) = delete;
  Pipe& operator=(Pipe&&) = delete;

  [[nodiscard]] int end(int which) const { return ends_[static_cast<std::size_t>(which)]; }
  void close_end(int which) {
    int& descriptor = ends_[static_cast<std::size_t>(which)];
    if (descriptor >= 0) close(descriptor);
    descriptor = -1;
  }

 private:
  std::array<int, 2> ends_{-1, -1};
};

[[noreturn]] void become(const std::vector<char*>& argv, const RunSettings& settings, const Pipe& in, const Pipe& out,
                         const Pipe& err) {
  dup2(in.end(0), STDIN_FILENO);
  dup2(out.end(1), STDOUT_FILENO);
  dup2(err.end(1), STDERR_FILENO);
  if (!settings.stdout_path.empty()) dup2(open(settings.stdout_path.c_str(), O_WRONLY | O_CLOEXEC), STDOUT_FILENO);
  if (!settings.stderr_path.empty()) dup2(open(settings.stderr_path.c_str(), O_WRONLY | O_CLOEXEC), STDERR_FILENO);
  for (const int descriptor : settings.closed) close(descriptor);
  for (const auto& [name, value] : settings.environment) setenv(name.c_str(), value.c_str(), 1);
  (void)std::signal(SIGPIPE, SIG_DFL);
  execv(argv[0], argv.data());
  _exit(127);
}

// Takes what is there; closes the pipe at its end.
void take(Pipe& pipe, std::string& text) {
  std::array<char, 65536> buffer;
  const ssize_t count = read(pipe.end(0), buffer.data(), buffer.size());
  if (count > 0) text.append(buffer.data(), static_cast<std::size_t>(count));
  if (count == 0) pipe.close_end(0);
}

// Feeds stdin and collects both outputs until the child has closed them. False where the time is up.
bool converse(pid_t child, const RunSettings& settings, Pipe& in, Pipe& out, Pipe& err, RunResult& result) {
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(settings.limit_s);
  std::size_t sent = 0;
  bool interrupted = settings.interrupt_after < 0;
  while (out.end(0) >= 0 || err.end(0) >= 0) {
    if (sent == settings.input.size()) in.close_end(1);
    std::array<pollfd, 3> ready = {pollfd{out.end(0), POLLIN, 0}, {err.end(0), POLLIN, 0}, {in.end(1), POLLOUT, 0}};
    if (poll(ready.data(), ready.size(), 100) < 0 || Clock::now() > deadline) return false;
    if (ready[0].revents != 0) take(out, result.out);
    if (ready[1].revents != 0) take(err, result.err);
    if (ready[2].revents != 0) {
      const ssize_t count = write(in.end(1), settings.input.data() + sent, settings.input.size() - sent);
      sent = count > 0 ? sent + static_cast<std::size_t>(count) : settings.input.size();
    }
    if (!interrupted && static_cast<std::int64_t>(result.out.size()) >= settings.interrupt_after) {
      kill(child, SIGINT);
      interrupted = true;
    }
  }
  return true;
}

}  // namespace

RunResult run_vesper(const std::vector<std::string>& arguments, const RunSettings& settings) {
  std::vector<std::string> words = arguments;
  words.insert(words.begin(), vesper_binary());
  std::vector<char*> argv;
  std::string command;
  for (std::string& word : words) {
    argv.push_back(word.data());
    command += word.substr(0, 200) + ' ';
  }
  argv.push_back(nullptr);

  RunResult result;
  Pipe in;
  Pipe out;
  Pipe err;
  (void)std::signal(SIGPIPE, SIG_IGN);  // a child that does not read its stdin is no fault
  const pid_t child = fork();
  if (child == 0) become(argv, settings, in, out, err);
  in.close_end(0);
  out.close_end(1);
  err.close_end(1);
  fcntl(in.end(1), F_SETFL, O_NONBLOCK);
  const bool in_time = converse(child, settings, in, out, err, result);
  EXPECT_TRUE(in_time) << "after " << settings.limit_s << " s still running: " << command;
  if (!in_time) kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status) << " ended: " << command << "\n" << result.err;
  EXPECT_NE(result.exit_code, 127) << "cannot start " << words[0];
  return result;
}

RunResult run_well(const std::vector<std::string>& arguments, const RunSettings& settings) {
  RunResult result = run_vesper(arguments, settings);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  return result;
}

std::string refused(const std::vector<std::string>& arguments, const RunSettings& settings) {
  const RunResult result = run_vesper(arguments, settings);
  EXPECT_EQ(result.exit_code, 2) << result.err;
  EXPECT_EQ(result.out, "");
  const std::size_t begin = result.err.find("error: ");
  if (begin == std::string::npos || result.err.back() != '\n') {
    ADD_FAILURE() << "no line of error: " << result.err;
    return "";
  }
  EXPECT_TRUE(begin == 0 || result.err[begin - 1] == '\n') << result.err;
  return result.err.substr(begin, result.err.size() - begin - 1);
}

}  // namespace vesper

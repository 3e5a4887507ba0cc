// Test macros, so that the core's tests need only a compiler.
#pragma once

#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace check {

struct Test {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  ++failures();
}

template <class A, class B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream out;
  out << text << ": " << a << " != " << b;
  fail(file, line, out.str());
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name{#name, name}; \
  static void name()
#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, "not true: " #condition))
#define CHECK_EQ(a, b) check::equal((a), (b), #a " == " #b, __FILE__, __LINE__)
// The message of the exception that `expression` throws must contain `part`.
#define CHECK_THROWS(expression, exception, part)                                              \
  do {                                                                                         \
    std::string message_ = "nothing thrown";                                                   \
    try {                                                                                      \
      expression;                                                                              \
    } catch (const exception& error_) {                                                        \
      message_ = error_.what();                                                                \
    }                                                                                          \
    if (message_.find(part) == std::string::npos)                                              \
      check::fail(__FILE__, __LINE__, "expected '" + std::string(part) + "' in: " + message_); \
  } while (false)

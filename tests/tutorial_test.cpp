// Keeps the tutorial true: what README.md and the chapters show, name and link
// to is compared with the examples, the header and the recordings. Each rule
// turns the texts of a tree of files into a list of problems. First come the
// rules, then the tests that apply them to this repository, and last those that
// apply them to a small tree with one thing wrong in it.
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <utility>

#include "markdown.hpp"

using namespace markdown;
namespace fs = std::filesystem;
using Problems = std::vector<std::string>;

namespace {

// ---------------------------------------------------------------------------
// Files and programs
// ---------------------------------------------------------------------------

// The files of a repository: their paths, and the texts that rules read.
using Tree = std::map<std::string, std::string>;

bool exists(const Tree& tree, const std::string& path) {
  const std::string folder = path.ends_with('/') ? path : path + '/';
  const auto inside = tree.lower_bound(folder);
  return tree.contains(path) || path == "." ||
         (inside != tree.end() && inside->first.starts_with(folder));
}

std::string text_of(const Tree& tree, const std::string& path) {
  const auto found = tree.find(path);
  return found == tree.end() ? "" : found->second;
}

Tree read_tree(const fs::path& root) {
  static const std::regex texts(".*\\.(md|cpp|hpp|txt|strace)");
  Tree tree;
  for (auto at = fs::recursive_directory_iterator(root);
       at != fs::recursive_directory_iterator(); ++at) {
    const std::string path = at->path().lexically_relative(root);
    if (path == ".git" || fs::exists(at->path() / "CMakeCache.txt"))
      at.disable_recursion_pending();
    if (!at->is_regular_file()) continue;
    std::ostringstream text;
    if (std::regex_match(path, texts))
      text << std::ifstream(at->path()).rdbuf();
    tree[path] = text.str();
  }
  return tree;
}

const Tree& repository() {
  static const Tree tree = read_tree(EDGEWISE_SOURCE_DIR);
  return tree;
}

// What a command prints, in a directory with these files.
std::string output_of(const std::string& command, const Tree& files) {
  std::string folder = fs::temp_directory_path() / "tutorial_test.XXXXXX";
  if (::mkdtemp(folder.data()) == nullptr)
    throw std::runtime_error("cannot make " + folder);
  for (const auto& [name, text] : files)
    std::ofstream(fs::path(folder) / name) << text;
  const std::string line = "cd '" + folder + "' && " + command + " 2>&1";
  std::FILE* pipe = ::popen(line.c_str(), "r");
  std::string output;
  for (int c = 0; pipe != nullptr && (c = std::fgetc(pipe)) != EOF;)
    output += static_cast<char>(c);
  if (pipe == nullptr || ::pclose(pipe) == -1) output = "cannot run " + command;
  fs::remove_all(folder);
  return output;
}

// `diff -U2 -p`, cut into hunks; each begins with its @@ line.
std::vector<Lines> hunks_between(const std::string& before,
                                 const std::string& after) {
  const Lines lines = split_lines(
      output_of("LC_ALL=C diff -U2 -p a b", {{"a", before}, {"b", after}}));
  if (!lines.empty() && !lines[0].starts_with("--- a"))
    throw std::runtime_error(lines[0]);
  std::vector<Lines> hunks;
  for (const std::string& line : lines) {
    if (line.starts_with("@@")) hunks.emplace_back();
    if (!hunks.empty()) hunks.back().push_back(line);
  }
  return hunks;
}

// ---------------------------------------------------------------------------
// Comparing lines
// ---------------------------------------------------------------------------

std::size_t indent_of(const std::string& line) {
  return std::min(line.find_first_not_of(' '), line.size());
}

// How many lines of `block` stand one after the other in `text`, at the place
// where most do. The block may lack indentation that all its lines share.
std::size_t longest_run(const Lines& text, const Lines& block) {
  std::size_t best = 0;
  for (std::size_t start = 0; start < text.size() && !block.empty(); ++start) {
    if (indent_of(text[start]) < indent_of(block[0])) continue;
    const std::size_t shift = indent_of(text[start]) - indent_of(block[0]);
    std::size_t run = 0;
    while (run < block.size() && start + run < text.size()) {
      const std::string& line = text[start + run];
      if (line.substr(std::min(shift, indent_of(line))) != block[run]) break;
      ++run;
    }
    best = std::max(best, run);
  }
  return best;
}

// The same within one hunk. Its @@ line may come first, whole or without the
// numbers ("@@ class Server {"); the lines that open the hunk follow it then.
std::size_t longest_run(const std::vector<Lines>& hunks, const Lines& block) {
  static const std::regex numbers("^@@ -.* @@");
  std::size_t best = 0;
  for (Lines hunk : hunks) {
    if (!block.empty() && block[0].starts_with("@@")) {
      if (block[0] != hunk[0])
        hunk[0] = std::regex_replace(hunk[0], numbers, "@@");
    } else {
      hunk.erase(hunk.begin());
    }
    best = std::max(best, longest_run(hunk, block));
  }
  return best;
}

// How many lines of `block` occur in `text`, in order, each within a line.
std::size_t longest_order(const Lines& text, const Lines& block) {
  std::size_t found = 0;
  for (const std::string& line : text)
    if (found < block.size() && line.find(trimmed(block[found])) != line.npos)
      ++found;
  return found;
}

// Columns on the screen, in that each code point takes one.
std::size_t width(const std::string& text) {
  return static_cast<std::size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// Lines of braces and other punctuation need no explanation.
bool says_something(const std::string& line) {
  return std::any_of(line.begin(), line.end(),
                     [](unsigned char c) { return std::isalnum(c) != 0; });
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != text.npos;
}

std::string joined(const Lines& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + '\n';
  return text;
}

// ---------------------------------------------------------------------------
// The rules
// ---------------------------------------------------------------------------

// The kinds of blocks, and the language that each is marked with.
const std::map<std::string, std::string> languages{
    {"code", "cpp"},        {"header", "cpp"},
    {"compile", "cpp"},     {"diff", "diff"},
    {"cmake", "cmake"},     {"run", "console"},
    {"console", "console"}, {"strace", "console|text|strace"},
    {"sketch", ".*"}};

// What a console block may call, besides our scripts and what it has built.
const std::regex known_programs(
    R"(nc|strace|c\+\+|g\+\+|clang\+\+|cmake|ctest|curl|git|bash|exec|kill)"
    R"(|cd|fg|bg|jobs|wait|ulimit|export|echo|printf|cat|seq|sleep|mkdir|cp)"
    R"(|ls|wc|head|tail|grep|diff|top|pidof|sort|timeout|yes|ss|done|fi)");

class Checker {
 public:
  explicit Checker(const Tree& tree) : tree_(tree) {
    static const std::regex page("README\\.md|tutorial/[^/]*\\.md");
    static const std::regex milestone("examples/(\\d\\d_\\w+)\\.cpp");
    std::smatch parts;
    for (const auto& [path, text] : tree) {
      if (std::regex_match(path, page)) pages_.push_back(parse(path, text));
      if (std::regex_match(path, parts, milestone))
        milestones_.push_back(parts[1]);
    }
  }

  // Every fenced block is what the comment before it says.
  Problems blocks() {
    for (const Document& page : pages_) {
      std::set<std::size_t> used;
      std::set<std::string> built;  // what the page's commands have compiled
      int sketches = 0;
      for (const Block& block : page.blocks) {
        used.insert(block.comment_line);
        check_form(page, block);
        check_content(page, block);
        if (block.kind == "console") check_session(page, block, built);
        if (block.kind == "sketch" && ++sketches > 2)
          report(page, block.line, "a third sketch: show code that is checked");
      }
      for (std::size_t i = 0; i < page.lines.size(); ++i)
        if (is_directive(page, i) && !used.contains(i + 1))
          report(page, i + 1, "no block follows: put the comment before one");
    }
    return problems_;
  }

  // Links lead somewhere, and files and options that are named exist.
  Problems references() {
    for (const Document& page : pages_) {
      for (const Text& link : page.links) check_link(page, link);
      for (const Text& span : page.code_spans) {
        check_paths(page, span);
        check_options(page, span);
      }
      for (const Block& block : page.blocks)
        if (block.kind == "console")
          for (const Text& line : command_lines(block))
            check_options(page, line);
    }
    return problems_;
  }

  // Chapters and milestones belong together, and the lists of them are
  // complete. A program may be there before its chapter, if that is said.
  Problems milestones() {
    if (milestones_.empty()) report("examples", 1, "there is no milestone");
    for (const std::string& name : milestones_) {
      const std::string chapter = name + ".md";
      const std::string& list = text_of(tree_, "tutorial/README.md");
      const bool is_to_come = contains(list, "](../" + example_of(name));
      const bool is_there = tree_.contains("tutorial/" + chapter);
      if (!is_there && !is_to_come)
        report(example_of(name), 1, "no tutorial/" + chapter + ": write it");
      if (is_there && is_to_come)
        report("tutorial/README.md", 1, chapter + " is there: link to it");
      if (!contains(text_of(tree_, "README.md"), name))
        report("README.md", 1, "does not list " + name);
      if (!is_to_come && !contains(list, "](" + chapter))
        report("tutorial/README.md", 1, "does not link " + chapter);
    }
    for (const Document& page : pages_) {
      if (page.path.ends_with("README.md"))
        check_names(page);
      else if (!tree_.contains(example_of(name_of(page))))
        report(page, 1, "no example has this name: rename one of them");
    }
    return problems_;
  }

  // A chapter shows each line that its milestone adds to the one before.
  Problems coverage() {
    std::string before;
    for (const std::string& name : milestones_) {
      const std::string after = text_of(tree_, example_of(name));
      for (const Document& page : pages_)
        if (name_of(page) == name) check_coverage(page, before, after);
      before = after;
    }
    return problems_;
  }

  // Chapters have the template's sections, in its order.
  Problems sections() {
    for (const Document& page : pages_) {
      if (name_of(page).empty()) continue;
      check_sections(page);
      check_steps(page);
    }
    return problems_;
  }

  // Pages can be read on a telephone, and chapters in one sitting.
  Problems layout() {
    for (const Document& page : pages_) {
      const std::size_t length = page.lines.size();
      if (!name_of(page).empty() && (length < 120 || length > 420))
        report(page, length, "a chapter has 120 to 420 lines");
      for (std::size_t i = 0; i < length; ++i) check_line(page, i);
      // The mark at the left of a diff is not counted.
      for (const Block& block : page.blocks)
        for (std::size_t i = 0; i < block.lines.size(); ++i)
          if (width(block.lines[i]) > (block.kind == "diff" ? 81u : 80u))
            report(page, block.line + 1 + i, "wider than 80 columns: break it");
      for (const Text& paragraph : page.paragraphs) check_html(page, paragraph);
    }
    return problems_;
  }

 private:
  void report(const std::string& path, std::size_t line,
              const std::string& what) {
    problems_.push_back(path + ':' + std::to_string(line) + ": " + what);
  }
  void report(const Document& page, std::size_t line, const std::string& what) {
    report(page.path, line, what);
  }

  static std::string example_of(const std::string& name) {
    return "examples/" + name + ".cpp";
  }

  // 03_lines for tutorial/03_lines.md, nothing for a README.
  static std::string name_of(const Document& page) {
    const fs::path path = page.path;
    return path.stem() == "README" ? "" : path.stem();
  }

  static bool is_directive(const Document& page, std::size_t index) {
    static const std::regex directive(R"(\s*<!--\s*(\w+).*)");
    std::smatch parts;
    return page.kinds[index] == Kind::comment &&
           std::regex_match(page.lines[index], parts, directive) &&
           languages.contains(parts[1]);
  }

  void check_form(const Document& page, const Block& block) {
    static const std::regex ellipsis(R"([-+ ]?\s*(//\s*)?(\.\.\.|…))");
    static const std::regex compared("code|diff|header");
    const auto kind = languages.find(block.kind);
    if (!block.closed) report(page, block.line, "this block is never closed");
    if (block.lines.empty()) report(page, block.line, "the block is empty");
    if (block.comment_line == 0)
      return report(page, block.line, "no comment says what this block is");
    if (kind == languages.end())
      return report(page, block.line, "no kind of block: " + block.kind);
    if (!std::regex_match(block.language, std::regex(kind->second)))
      report(page, block.line, "write ```" + kind->second + " here");
    if (!std::regex_match(block.kind, compared)) return;
    for (std::size_t i = 0; i < block.lines.size(); ++i)
      if (std::regex_match(block.lines[i], ellipsis))
        report(page, block.line + 1 + i, "an ellipsis: show two blocks");
  }

  void check_content(const Document& page, const Block& block) {
    const std::string recording = "tutorial/runs/" + block.argument;
    if (block.kind == "code") {
      if (const auto text = file(page, block, block.argument))
        compare(page, block, longest_run(*text, block.lines), block.argument);
    } else if (block.kind == "strace") {
      if (const auto text = file(page, block, recording + ".strace"))
        compare(page, block, longest_order(*text, block.lines), recording);
    } else if (block.kind == "header") {
      check_header(page, block);
    } else if (block.kind == "diff") {
      check_diff(page, block);
    } else if (block.kind == "run") {
      check_recording(page, block, recording + ".txt");
    } else if (block.kind == "compile") {
      check_program(page, block);
    } else if (block.kind == "cmake" &&
               !contains(joined(block.lines), "edgewise::edgewise")) {
      // CMake itself is not run here.
      report(page, block.line, "does not name edgewise::edgewise");
    }
  }

  std::optional<Lines> file(const Document& page, const Block& block,
                            const std::string& path) {
    if (tree_.contains(path)) return split_lines(tree_.at(path));
    report(page, block.comment_line, "there is no " + path);
    return {};
  }

  // Reports the first line of a block that is not where it is said to be.
  void compare(const Document& page, const Block& block, std::size_t equal,
               const std::string& where) {
    if (equal < block.lines.size())
      report(
          page, block.line + 1 + equal,
          "at this place, " + where + " differs from: " + block.lines[equal]);
  }

  void check_header(const Document& page, const Block& block) {
    const std::string path = "include/edgewise.hpp";
    const std::size_t colon = block.argument.find_last_of(':');
    const std::string name = block.argument.substr(colon + 1);
    if (const auto text = file(page, block, path))
      compare(page, block, longest_run(*text, block.lines), path);
    if (!contains(joined(block.lines), name))
      report(page, block.comment_line, "the block does not show " + name);
  }

  void check_diff(const Document& page, const Block& block) {
    std::istringstream names(block.argument);
    std::string before, after;
    names >> before >> after;
    for (const std::string& name : {before, after})
      if (!file(page, block, example_of(name))) return;
    const auto hunks = hunks_between(tree_.at(example_of(before)),
                                     tree_.at(example_of(after)));
    compare(page, block, longest_run(hunks, block.lines),
            "each hunk of the diff of " + block.argument);
  }

  void check_recording(const Document& page, const Block& block,
                       const std::string& path) {
    const auto text = file(page, block, path);
    if (!text) return;
    const auto [shown, recorded] = std::mismatch(
        block.lines.begin(), block.lines.end(), text->begin(), text->end());
    const auto equal = static_cast<std::size_t>(shown - block.lines.begin());
    compare(page, block, equal, path);
    if (shown == block.lines.end() && recorded != text->end())
      report(page, block.line + equal, path + " goes on: " + *recorded);
  }

  void check_program(const Document& page, const Block& block) {
    const std::string errors = output_of(
        "${CXX:-c++} -std=c++20 -Wall -Wextra -Wpedantic -Werror "
        "-fsyntax-only -I . program.cpp",
        {{"program.cpp", joined(block.lines)},
         {"edgewise.hpp", text_of(tree_, "include/edgewise.hpp")}});
    if (!errors.empty()) report(page, block.line, "not compiled: " + errors);
  }

  void check_session(const Document& page, const Block& block,
                     std::set<std::string>& built) {
    static const std::regex compiler(R"(c\+\+|g\+\+|clang\+\+)");
    for (const Text& line : command_lines(block)) {
      check_paths(page, line);
      for (const Lines& words : commands_of(line.text)) {
        const auto program = program_in(words);
        for (auto word = program; word != words.end(); ++word)
          if ((word == program || word->starts_with("./")) &&
              !may_run(*word, built))
            report(page, line.line, "no reader can run '" + *word + "' here");
        const auto option = std::find(program, words.end(), "-o");
        if (words.end() - option > 1 && std::regex_match(*program, compiler))
          built.insert("./" + *(option + 1));
      }
    }
  }

  // Steps over assignments and over what begins a loop or a condition.
  static Lines::const_iterator program_in(const Lines& words) {
    static const std::regex prefix(R"(\w+=.*|do|while|if|then|else|!)");
    if (words[0] == "for") return words.end();
    return std::find_if_not(words.begin(), words.end(), [](const auto& word) {
      return std::regex_match(word, prefix);
    });
  }

  // Our scripts, what CMake builds of our sources, what the reader has built.
  bool may_run(const std::string& program,
               const std::set<std::string>& built) const {
    static const std::regex cmake_built(
        R"((?:\./)?build[\w-]*/((?:examples|tests)/\w+))");
    std::smatch parts;
    if (built.contains(program)) return true;
    if (std::regex_match(program, parts, cmake_built))
      return tree_.contains(parts.str(1) + ".cpp");
    if (!contains(program, "/"))
      return std::regex_match(program, known_programs);
    return tree_.contains(program.substr(program.starts_with("./") ? 2 : 0));
  }

  void check_paths(const Document& page, const Text& text) {
    for (const std::string& path : own_paths(text.text))
      if (!exists(tree_, path)) report(page, text.line, "there is no " + path);
  }

  // Options that stand alone are taken for rat's.
  void check_options(const Document& page, const Text& text) {
    static const std::regex rat(R"((.*/)?rat|examples/run|--.*)");
    static const std::regex option("(--[a-z][a-z-]*).*");
    const std::string source = text_of(tree_, example_of("rat"));
    for (const Lines& words : commands_of(text.text)) {
      const auto program = program_in(words);
      if (program == words.end() || !std::regex_match(*program, rat)) continue;
      std::smatch parts;
      for (const std::string& word : words)
        if (std::regex_match(word, parts, option) &&
            !contains(source, '"' + parts.str(1) + '"'))
          report(page, text.line, "rat has no option " + parts.str(1));
    }
  }

  void check_link(const Document& page, const Text& link) {
    static const std::regex elsewhere("[a-z]+:.*");
    if (std::regex_match(link.text, elsewhere)) return;
    const std::size_t hash = link.text.find('#');
    fs::path target = page.path;
    if (hash != 0) target = target.parent_path() / link.text.substr(0, hash);
    const std::string path = target.lexically_normal();
    if (!exists(tree_, path))
      report(page, link.line, "the link leads nowhere: " + link.text);
    else if (hash != link.text.npos &&
             !anchors_of(parse(path, text_of(tree_, path)))
                  .contains(link.text.substr(hash + 1)))
      report(page, link.line, "no such heading: " + link.text);
  }

  void check_names(const Document& page) {
    static const std::regex name(R"(\b\d\d_[a-z]\w*)");
    for (std::size_t i = 0; i < page.lines.size(); ++i)
      for (const auto& found : matches(page.lines[i], name))
        if (!tree_.contains(example_of(found.str())))
          report(page, i + 1, "there is no milestone " + found.str());
  }

  // Each line is to be shown as often as it is added.
  void check_coverage(const Document& page, const std::string& before,
                      const std::string& after) {
    static const std::regex position(R"(@@ -\S+ \+(\d+).*)");
    auto shown = lines_shown(page);
    for (const Lines& hunk : hunks_between(before, after)) {
      std::smatch parts;
      std::regex_match(hunk[0], parts, position);
      std::size_t line = std::stoul(parts[1]);
      for (auto at = hunk.begin() + 1; at != hunk.end(); ++at) {
        const std::string added = at->starts_with('+') ? at->substr(1) : "";
        if (says_something(added) && shown[trimmed(added)]-- <= 0)
          report(example_of(name_of(page)), line,
                 page.path + " does not show this new line: " + added);
        if (!at->starts_with('-')) ++line;
      }
    }
  }

  static std::map<std::string, int> lines_shown(const Document& page) {
    std::map<std::string, int> shown;
    for (const Block& block : page.blocks) {
      const bool diff =
          block.kind == "diff" && block.argument.ends_with(' ' + name_of(page));
      const bool code =
          block.kind == "code" && block.argument == example_of(name_of(page));
      for (const std::string& line : block.lines)
        if (code || (diff && line.starts_with('+')))
          ++shown[trimmed(line.substr(diff ? 1 : 0))];
    }
    return shown;
  }

  // Setting up belongs to the first chapter, before its failure or right after.
  static bool may_set_up(const Document& page, const Lines& sections) {
    return name_of(page).starts_with("01_") &&
           (sections.empty() || sections == Lines{"Watch it fail"});
  }

  void check_sections(const Document& page) {
    static const Lines order{"Watch it fail",  "The idea",
                             "The change",     "See it work",
                             "Under the hood", "What could go wrong",
                             "In the wild"};
    static const std::regex optional("Under the hood|In the wild");
    static const std::regex anywhere("Also changed|Check your own|Exercises");
    auto next = order.begin();
    Lines seen;
    if (page.headings.empty() || page.headings[0].line != 1)
      report(page, 1, "a chapter has one title, on its first line");
    for (const Heading& heading : page.headings) {
      const std::string& text = heading.text;
      if (heading.level == 1 && heading.line != 1)
        report(page, heading.line,
               "a chapter has one title, on its first line");
      if (heading.level != 2) continue;
      const auto place = std::find(order.begin(), order.end(), text);
      if (place < next ||
          std::find(seen.begin(), seen.end(), text) != seen.end())
        report(page, heading.line, "the template has this section earlier");
      else if (place != order.end())
        next = place + 1;
      else if (!std::regex_match(text, anywhere) &&
               !(text == "Set up" && may_set_up(page, seen)))
        report(page, heading.line, "the template has no such section here");
      seen.push_back(text);
    }
    for (const std::string& text : order)
      if (std::find(seen.begin(), seen.end(), text) == seen.end() &&
          !std::regex_match(text, optional))
        report(page, 1, "the section is missing: ## " + text);
  }

  void check_steps(const Document& page) {
    const std::size_t most = name_of(page).starts_with("01_") ? 12 : 9;
    std::size_t steps = 0;
    std::string section;
    for (const Heading& heading : page.headings) {
      if (heading.level == 2) section = heading.text;
      if (heading.level == 3 && section == "The change") ++steps;
    }
    if (steps < 2 || steps > most)
      report(page, 1,
             "The change has " + std::to_string(steps) +
                 " steps: make it 2 to " + std::to_string(most));
  }

  void check_line(const Document& page, std::size_t index) {
    static const std::regex only_link(
        R"(\s*([-*+] |\d+\. )?(!?\[[^\]]*\](\(\S*\)|: \S+)|<\S+>)[.,;:]?)");
    const std::string& line = page.lines[index];
    const Kind kind = page.kinds[index];
    const auto unless = [&](bool good, const char* what) {
      if (!good) report(page, index + 1, what);
    };
    if (kind == Kind::table) {
      unless(std::count(line.begin(), line.end(), '|') <= 4,
             "a table with more than 3 columns");
    } else if (kind == Kind::diagram) {
      unless(width(line) <= 84, "wider than 80 columns: break it");
      unless(!line.ends_with(';'), "code is shown in a fenced block");
    } else if (kind == Kind::comment) {
      unless(line.ends_with("-->"), "a comment ends on its line");
    } else if (kind == Kind::prose || kind == Kind::heading) {
      unless(width(line) <= 100 || std::regex_match(line, only_link),
             "wider than 100 columns: break it");
    }
  }

  void check_html(const Document& page, const Text& paragraph) {
    static const std::regex tag(
        R"(<(?!/?(details|summary)>|https?://)/?[A-Za-z!])");
    if (std::regex_search(paragraph.text, tag))
      report(page, paragraph.line, "raw HTML: only <details> and <summary>");
  }

  const Tree& tree_;
  std::vector<Document> pages_;
  Lines milestones_;
  Problems problems_;
};

void expect_none(const Problems& problems) {
  CHECK(problems.empty());
  for (const std::string& problem : problems) FAIL_CHECK(problem);
}

}  // namespace

// ---------------------------------------------------------------------------
// This repository
// ---------------------------------------------------------------------------

TEST_CASE("every block of the tutorial is what the comment before it says") {
  expect_none(Checker(repository()).blocks());
}

TEST_CASE("links lead somewhere, and named files and options exist") {
  expect_none(Checker(repository()).references());
}

TEST_CASE("each milestone has its chapter, and is listed") {
  expect_none(Checker(repository()).milestones());
}

TEST_CASE("each chapter shows every line that its milestone adds") {
  expect_none(Checker(repository()).coverage());
}

TEST_CASE("each chapter has the template's sections in order") {
  expect_none(Checker(repository()).sections());
}

TEST_CASE("pages keep to the widths and lengths that are easy to read") {
  expect_none(Checker(repository()).layout());
}

TEST_CASE("one character more in any compared block is noticed") {
  static const std::regex compared("code|diff|header|run|strace");
  for (const auto& [path, text] : repository()) {
    if (!path.starts_with("tutorial/") || !path.ends_with(".md")) continue;
    Tree tree = repository();
    std::erase_if(tree,
                  [](const auto& file) { return file.first.ends_with(".md"); });
    for (const Block& block : parse(path, text).blocks) {
      if (!std::regex_match(block.kind, compared)) continue;
      Lines lines = split_lines(text);
      lines[block.line + block.lines.size() / 2] += '~';
      tree[path] = joined(lines);
      const std::string page = path;
      CAPTURE(page);
      CAPTURE(block.line);
      CHECK_FALSE(Checker(tree).blocks().empty());
    }
  }
}

// ---------------------------------------------------------------------------
// A small tree, with one thing wrong
// ---------------------------------------------------------------------------

namespace {

const char* const example_one = R"(// 01_one: one.

int answer() {
  if (true) {
    return 1;
  }
}
)";

const char* const example_two = R"(// 02_two: two.

int answer() {
  if (true) {
    return 2;
  }
}

int twice() { return 2 * answer(); }
)";

const char* const chapter_one = R"(# 01 One
## Watch it fail
## Set up
<!-- console -->
```console
$ c++ one.cpp -o one && ./one
1
$ (printf 'a; b'; sleep 1) | nc -N 127.0.0.1 8080 2>&1 < /dev/null
$ build/examples/01_one & kill $(pidof one)
$ examples/run --port 9000   # starts rat
```
## The idea

    socket -> Token 1

## The change
### 1. Begin
<!-- code: examples/01_one.cpp -->
```cpp
// 01_one: one.

int answer() {
```
<!-- sketch -->
```cpp
int dummy();
```
<!-- sketch -->
```cpp
int dummy();
```
### 2. Return
<!-- code: examples/01_one.cpp -->
```cpp
if (true) {
  return 1;
}
```
## See it work
## What could go wrong
)";

const char* const chapter_two = R"(# 02 Two
## Watch it fail
See [the idea](#the-idea), [one](01_one.md#1-begin), [files](../examples),
[epoll(7)](https://man7.org/linux/man-pages/man7/epoll.7.html).
## The idea
<!-- header: Poller::wait -->
```cpp
void wait() {}
```
| a | b | c |
## The change
### 1. Two for one
<!-- diff: 01_one 02_two -->
```diff
-// 01_one: one.
+// 02_two: two.
```
<!-- diff: 01_one 02_two -->
```diff
   if (true) {
-    return 1;
+    return 2;
```
### 2. Twice
<!-- code: examples/02_two.cpp -->
```cpp
int twice() { return 2 * answer(); }
```
## See it work
<!-- run: 02_two/hello -->
```console
listening on 127.0.0.1:PORT1
client 1: hello
```
## Under the hood
<!-- strace: 02_two/hello -->
```text
epoll_wait(4, [{EPOLLIN, u64=1}]
recvfrom(5, "hello") = 6
```
## What could go wrong

Nothing, says `tests/run`.
)";

const char* const readme = R"(
<!-- compile -->
```cpp
#include <edgewise.hpp>
int main() { Poller().wait(); }
```
<!-- cmake -->
```cmake
target_link_libraries(server PRIVATE edgewise::edgewise)
```
01_one and 02_two; `rat --port=1`, `--port`, `cmake --build build`.
)";

std::string words(std::size_t lines) {
  return joined(Lines(lines, "Words about sockets."));
}

Tree small_tree() {
  return {
      {"README.md", readme},
      {"examples/01_one.cpp", example_one},
      {"examples/02_two.cpp", example_two},
      {"examples/rat.cpp", "if (name == \"--port\")\n"},
      {"examples/run", ""},
      {"tests/run", ""},
      {"include/edgewise.hpp", "struct Poller {\n  void wait() {}\n};\n"},
      {"tutorial/README.md", "[One](01_one.md), [two](02_two.md)\n"},
      {"tutorial/01_one.md", chapter_one + words(100)},
      {"tutorial/02_two.md", chapter_two + words(100)},
      {"tutorial/runs/02_two/hello.txt",
       "listening on 127.0.0.1:PORT1\nclient 1: hello\n"},
      {"tutorial/runs/02_two/hello.strace",
       "epoll_wait(4, [{EPOLLIN, u64=1}], 64) = 1\naccept4(3) = 5\n"
       "recvfrom(5, \"hello\") = 6\n"},
  };
}

Problems problems_of(const Tree& tree) {
  Problems all;
  for (const auto rule :
       {&Checker::blocks, &Checker::references, &Checker::milestones,
        &Checker::coverage, &Checker::sections, &Checker::layout}) {
    const Problems problems = (Checker(tree).*rule)();
    all.insert(all.end(), problems.begin(), problems.end());
  }
  return all;
}

struct Mutation {
  std::string from;
  std::string to;
  std::string problem;
};

// Each change, made to this file by itself, leads to its problem.
void expect_found(const std::string& path,
                  const std::vector<Mutation>& mutations) {
  for (const Mutation& mutation : mutations) {
    const std::string& from = mutation.from;
    Tree tree = small_tree();
    std::string& text = tree.at(path);
    REQUIRE_MESSAGE(contains(text, from), from);
    text.replace(text.find(from), from.size(), mutation.to);
    const std::string problems = joined(problems_of(tree));
    CHECK_MESSAGE(contains(problems, mutation.problem), "'", from, "' -> '",
                  mutation.to, "' does not lead to '", mutation.problem,
                  "' but to: ", problems);
  }
}

}  // namespace

TEST_CASE("the small tree has no problems") {
  expect_none(problems_of(small_tree()));
}

TEST_CASE("a missing chapter, tutorial or example is reported") {
  CHECK(contains(joined(problems_of({})), "there is no milestone"));
  Tree tree = small_tree();
  tree.erase("tutorial/02_two.md");
  CHECK(contains(joined(problems_of(tree)), "no tutorial/02_two.md"));
  const std::string to_come = "[One](01_one.md), [two](../examples/02_two.cpp)";
  tree.at("tutorial/README.md") = to_come;
  expect_none(problems_of(tree));
  tree = small_tree();
  tree.at("tutorial/README.md") = to_come;
  CHECK(contains(joined(problems_of(tree)), "02_two.md is there: link to it"));
  tree = small_tree();
  tree.erase("examples/02_two.cpp");
  CHECK(contains(joined(problems_of(tree)), "no example has this name"));
}

TEST_CASE("a block that is not what its comment says is reported") {
  expect_found(
      "tutorial/01_one.md",
      {{"answer() {\n```", "answer( {\n```", "one.md:22: at this place"},
       {"<!-- sketch -->\n", "", "one.md:24: no comment says"},
       {"<!-- sketch -->", "<!-- scetch -->", "no kind of block: scetch"},
       {"  return 1;", "    return 1;", "one.md:36: at this place"},
       {"  return 1;", "...", "one.md:36: an ellipsis"},
       {"code: examples/01", "code: examples/03", "no examples/03_one.cpp"},
       {"int dummy();\n", "", "the block is empty"},
       {"## See it work", "<!-- diff: a b -->", "no block follows"},
       {"```\n## See it work", "## See it work", "never closed"},
       {"## See", "<!-- sketch -->\n```\nx\n```\n## See", "a third sketch"}});
  expect_found("tutorial/02_two.md",
               {{"-    return 1;\n", "", "two.md:21: at this place"},
                {"+    return 2;", "     return 2;", "two.md:22: at this"},
                {"-// 01_one: one.", "@@ -1,7 @@", "two.md:15: at this place"},
                {"```diff", "```cpp", "two.md:14: write ```diff"},
                {"diff: 01_one", "diff: 00_one", "no examples/00_one.cpp"},
                {"void wait() {}", "void wait() {", "two.md:8: at this place"},
                {"Poller::wait", "Poller::want", "does not show want"},
                {"client 1: hello", "client 1: hallo", "two.md:33: at this"},
                {"client 1: hello\n", "", "goes on: client 1: hello"},
                {"run: 02_two/hello", "run: 02_two/hi", "hi.txt"},
                {") = 6", ") = 7", "two.md:39: at this place"},
                {"strace: 02_two/hello", "strace: 02_two/hi", "hi.strace"}});
  expect_found("README.md", {{"wait(); }", "wait() }", "not compiled"},
                             {"edgewise::edge", "edge", "does not name"}});
}

TEST_CASE("a diff block may begin with the @@ line of its hunk") {
  for (const char* opening : {"@@ -1,7 +1,9 @@\n", "@@\n"}) {
    Tree tree = small_tree();
    std::string& text = tree["tutorial/02_two.md"];
    text.insert(text.find("-// 01_one"), opening);
    expect_none(Checker(tree).blocks());
  }
}

TEST_CASE("a session that no reader can repeat is reported") {
  expect_found("tutorial/01_one.md",
               {{"-o one", "-o two", "one.md:6: no reader can run './one'"},
                {"nc -N", "netcat -N", "no reader can run 'netcat' here"},
                {"| nc", "| strace ./nc", "no reader can run './nc' here"},
                {"$(pidof", "$(pgrep", "no reader can run 'pgrep' here"},
                {"build/examples/01_one", "build/examples/03", "no reader"},
                {"examples/run", "examples/rum", "there is no examples/rum"},
                {"--port", "--prot", "one.md:10: rat has no option --prot"}});
}

TEST_CASE("a name or a link that leads nowhere is reported") {
  expect_found("tutorial/02_two.md",
               {{"#the-idea", "#an-idea", "two.md:3: no such heading"},
                {"#1-begin", "#1-end", "two.md:3: no such heading"},
                {"(01_one.md#", "(00_one.md#", "leads nowhere: 00_one.md"},
                {"(../examples)", "(../../examples)", "leads nowhere"},
                {"`tests/run`", "`tests/walk`", "there is no tests/walk"}});
  expect_found("README.md",
               {{"`--port`", "`--part`", "README.md:11: rat has no option"},
                {"--port=1", "--por=1", "rat has no option --por"},
                {"02_two", "02_too", "README.md:1: does not list 02_two"},
                {"02_two", "02_too", "README.md:11: there is no milestone"}});
  expect_found("tutorial/README.md",
               {{"(02_two.md)", "", "does not link 02_two.md"}});
}

TEST_CASE("a new line that the chapter does not show is reported") {
  expect_found("tutorial/01_one.md",
               {{"if (true) {\n", "", "examples/01_one.cpp:4: "}});
  expect_found("tutorial/02_two.md",
               {{"code: examples/02_two.cpp", "sketch", "02_two.cpp:9: "},
                {"+// 02_two: two.\n", "", "examples/02_two.cpp:1: "}});
  expect_found("examples/02_two.cpp",
               {{"int twice", "#include <set>\nint twice",
                 "examples/02_two.cpp:9: tutorial/02_two.md does not show"}});
}

TEST_CASE("a chapter that is not built like the template is reported") {
  expect_found("tutorial/02_two.md",
               {{"# 02 Two", "", "two.md:1: a chapter has one title"},
                {"## The idea", "# The idea", "two.md:5: a chapter has one"},
                {"## The idea", "## An idea", "no such section here"},
                {"## The idea\n", "", "section is missing: ## The idea"},
                {"## The idea", "## The change", "two.md:11: the template"},
                {"## Under the hood", "## In the wild", "section earlier"},
                {"## Under", "## Set up\n## Under", "no such section here"},
                {"### 2. Twice", "", "The change has 1 steps"}});
  expect_found("tutorial/01_one.md",
               {{"## Set up", "## The idea\n## Set up", "no such section"}});
}

TEST_CASE("what is hard to read is reported") {
  const std::string wide(101, 'x');
  expect_found("tutorial/02_two.md",
               {{"Nothing", wide, "two.md:43: wider than 100 columns"},
                {"Nothing", "<b>No</b>", "two.md:43: raw HTML"},
                {"Nothing", "<!-- Nothing", "a comment ends on its line"},
                {"Nothing", "    int x;\n", "code is shown in a fenced"},
                {"int twice", wide, "two.md:27: wider than 80 columns"},
                {"| c |", "| c | d |", "a table with more than 3 columns"},
                {words(100), words(400), "a chapter has 120 to 420"},
                {words(100), "", "a chapter has 120 to 420 lines"}});
}

// Reads as much Markdown as the tutorial uses: headings, paragraphs with links
// and inline code, tables, fenced blocks with the comment before them, and the
// commands of a console block.
#ifndef TESTS_MARKDOWN_HPP
#define TESTS_MARKDOWN_HPP

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

// With AddressSanitizer, g++ 12 takes parts of <regex> for uninitialized.
#if defined(__GNUC__) && !defined(__clang__)
  #pragma GCC diagnostic push
  #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <regex>
#if defined(__GNUC__) && !defined(__clang__)
  #pragma GCC diagnostic pop
#endif

namespace markdown {

using Lines = std::vector<std::string>;

enum class Kind { blank, prose, heading, table, comment, fence, code, diagram };

struct Text {
  std::string text;
  std::size_t line = 0;  // counted from 1, as everywhere here
};

struct Heading {
  std::size_t level = 0;
  std::string text;
  std::size_t line = 0;
};

// A fenced block, and `kind: argument` out of the comment before it.
struct Block {
  std::string kind;
  std::string argument;
  std::string language;
  std::size_t comment_line = 0;  // 0: there is none
  std::size_t line = 0;          // of the opening fence
  bool closed = false;
  Lines lines;
};

struct Document {
  std::string path;
  Lines lines;
  std::vector<Kind> kinds;  // one a line
  std::vector<Block> blocks;
  std::vector<Heading> headings;
  std::vector<Text> paragraphs;  // inline code is blanked out
  std::vector<Text> code_spans;
  std::vector<Text> links;  // their targets
};

inline std::string trimmed(const std::string& text) {
  const std::size_t first = text.find_first_not_of(" \t\r");
  if (first == text.npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r") + 1 - first);
}

// The lines, without blanks at their ends: no rule here looks at those.
inline Lines split_lines(const std::string& text) {
  Lines lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);)
    lines.push_back(line.substr(0, line.find_last_not_of(" \t\r") + 1));
  return lines;
}

inline std::vector<std::smatch> matches(const std::string& text,
                                        const std::regex& pattern) {
  return {std::sregex_iterator(text.begin(), text.end(), pattern), {}};
}

// ---------------------------------------------------------------------------
// Lines and blocks
// ---------------------------------------------------------------------------

inline Kind kind_outside_fences(const std::string& line, Kind previous,
                                bool in_list) {
  static const std::regex heading("#+ .*");
  const std::string text = trimmed(line);
  const bool indented = line.starts_with("    ") || line.starts_with('\t');
  const bool apart = previous == Kind::blank || previous == Kind::diagram;
  if (text.empty()) return Kind::blank;
  if (text.starts_with("```") || text.starts_with("~~~")) return Kind::fence;
  if (indented && apart && !in_list) return Kind::diagram;
  if (text.starts_with("<!--")) return Kind::comment;
  if (text.starts_with('|')) return Kind::table;
  return std::regex_match(line, heading) ? Kind::heading : Kind::prose;
}

inline std::vector<Kind> kinds_of(const Lines& lines) {
  static const std::regex list_item(R"(([-*+]|\d+\.) .*)");
  std::vector<Kind> kinds;
  std::string fence;  // what closes the block that is open
  bool in_list = false;
  Kind previous = Kind::blank;
  for (const std::string& line : lines) {
    const std::string text = trimmed(line);
    if (fence.empty()) {
      previous = kind_outside_fences(line, previous, in_list);
      if (previous == Kind::fence)
        fence = text.substr(0, text.find_first_not_of(text[0]));
      if (!line.empty() && line[0] != ' ')
        in_list = std::regex_match(line, list_item);
    } else {
      previous = text == fence ? Kind::fence : Kind::code;
      if (text == fence) fence.clear();
    }
    kinds.push_back(previous);
  }
  return kinds;
}

// Fills in what the comment says, if the last line before the block that is
// not blank is one.
inline void read_comment(const Document& document, Block& block) {
  static const std::regex comment(R"(<!--\s*([^:]*?)\s*(?::\s*(.*?)\s*)?-->)");
  std::size_t above = block.line - 1;
  while (above > 0 && document.kinds[above - 1] == Kind::blank) --above;
  if (above == 0 || document.kinds[above - 1] != Kind::comment) return;
  std::smatch parts;
  const std::string text = trimmed(document.lines[above - 1]);
  if (!std::regex_match(text, parts, comment)) return;
  block.comment_line = above;
  block.kind = parts[1];
  block.argument = parts[2];
}

inline std::vector<Block> blocks_of(const Document& document) {
  std::vector<Block> blocks;
  bool open = false;
  for (std::size_t i = 0; i < document.lines.size(); ++i) {
    const std::string& line = document.lines[i];
    if (document.kinds[i] == Kind::code) blocks.back().lines.push_back(line);
    if (document.kinds[i] != Kind::fence) continue;
    open = !open;
    if (open) {
      blocks.emplace_back().line = i + 1;
      blocks.back().language =
          trimmed(line.substr(line.find_last_of("`~") + 1));
      read_comment(document, blocks.back());
    } else {
      blocks.back().closed = true;
    }
  }
  return blocks;
}

// ---------------------------------------------------------------------------
// Paragraphs
// ---------------------------------------------------------------------------

// Moves inline code and the targets of links out of a paragraph. Blanks take
// the place of code, so that what stands behind it keeps its line.
inline void finish_paragraph(Document& document, Text paragraph) {
  static const std::regex code("``.+?``|`[^`]+`");
  static const std::regex link(R"(\](?:\(|: )([^)\s]+))");
  const auto line_of = [&](const std::smatch& match) {
    const std::string before = match.prefix();
    const auto newlines = std::count(before.begin(), before.end(), '\n');
    return paragraph.line + static_cast<std::size_t>(newlines);
  };
  std::smatch match;
  while (std::regex_search(paragraph.text, match, code)) {
    std::string span = match[0];
    const auto start = static_cast<std::size_t>(match.position());
    const std::size_t line = line_of(match);
    for (std::size_t i = 0; i < span.size(); ++i)
      if (span[i] != '\n') paragraph.text[start + i] = ' ';
    std::replace(span.begin(), span.end(), '\n', ' ');
    span.erase(std::remove(span.begin(), span.end(), '`'), span.end());
    document.code_spans.push_back({trimmed(span), line});
  }
  std::size_t line = paragraph.line;
  for (const std::string& text : split_lines(paragraph.text)) {
    for (const auto& found : matches(text, link))
      document.links.push_back({found[1], line});
    ++line;
  }
  document.paragraphs.push_back(std::move(paragraph));
}

inline void read_paragraphs(Document& document) {
  Text paragraph;
  for (std::size_t i = 0; i <= document.lines.size(); ++i) {
    const Kind kind =
        i < document.lines.size() ? document.kinds[i] : Kind::blank;
    const bool goes_on = kind == Kind::prose || kind == Kind::table;
    if (!goes_on && !paragraph.text.empty()) {
      finish_paragraph(document, paragraph);
      paragraph = {};
    }
    if (kind == Kind::heading) {
      finish_paragraph(document, {document.lines[i], i + 1});
      const std::size_t level = document.lines[i].find(' ');
      const std::string text = trimmed(document.lines[i].substr(level));
      document.headings.push_back({level, text, i + 1});
    }
    if (!goes_on) continue;
    if (paragraph.text.empty()) paragraph.line = i + 1;
    paragraph.text += document.lines[i] + '\n';
  }
}

inline Document parse(const std::string& path, const std::string& text) {
  Document document;
  document.path = path;
  document.lines = split_lines(text);
  document.kinds = kinds_of(document.lines);
  document.blocks = blocks_of(document);
  read_paragraphs(document);
  return document;
}

// The anchors of a document's headings, as GitHub makes them.
inline std::set<std::string> anchors_of(const Document& document) {
  std::set<std::string> anchors;
  std::map<std::string, int> seen;
  for (const Heading& heading : document.headings) {
    std::string slug;
    for (const char c : heading.text) {
      const auto byte = static_cast<unsigned char>(c);
      if (std::isalnum(byte) != 0 || c == '_' || c == '-' || byte >= 0x80)
        slug += static_cast<char>(std::tolower(byte));
      if (c == ' ') slug += '-';
    }
    const int before = seen[slug]++;
    anchors.insert(before == 0 ? slug : slug + '-' + std::to_string(before));
  }
  return anchors;
}

// ---------------------------------------------------------------------------
// Console blocks
// ---------------------------------------------------------------------------

// The commands that a shell would start for this line, each as its words: as
// much of sh as a reader is asked to type.
inline std::vector<Lines> commands_of(std::string line) {
  static const std::regex quoted("'[^']*'|\"[^\"]*\"");
  static const std::regex comment(R"((^|\s)#.*)");
  static const std::regex redirection(R"(\d*[<>][<>&]*\s*[^\s;|&()]+)");
  static const std::regex substitution(R"(\$\(([^()]*)\))");
  static const std::regex simple_command("[^;|&()]+");
  line = std::regex_replace(line, quoted, "quoted");
  line = std::regex_replace(line, comment, "");
  line = std::regex_replace(line, redirection, " ");
  std::string inner;
  for (const auto& match : matches(line, substitution))
    inner += " ; " + match.str(1);
  line = std::regex_replace(line, substitution, "substituted") + inner;
  std::vector<Lines> commands;
  for (const auto& match : matches(line, simple_command)) {
    std::istringstream stream(match.str());
    Lines words;
    for (std::string word; stream >> word;) words.push_back(word);
    if (!words.empty()) commands.push_back(words);
  }
  return commands;
}

// The lines of a console block that begin with `$ `, each with those that a
// backslash adds to it.
inline std::vector<Text> command_lines(const Block& block) {
  std::vector<Text> found;
  bool continued = false;
  for (std::size_t i = 0; i < block.lines.size(); ++i) {
    std::string line = block.lines[i];
    const bool begins = !continued && line.starts_with("$ ");
    if (begins) found.push_back({"", block.line + 1 + i});
    const bool belongs = begins || continued;
    continued = belongs && line.ends_with('\\');
    if (continued) line.pop_back();
    if (belongs) found.back().text += line.substr(begins ? 2 : 0);
  }
  return found;
}

// The paths in a text that lie in this repository, told by how they begin. A
// path below another directory (build/examples/rat) is not one of them.
inline Lines own_paths(const std::string& text) {
  static const std::regex path(
      R"((?:^|[^\w/.-]|\./|edgewise/))"
      R"(((?:examples|include|tests|tutorial)/[\w./-]*[\w-]))");
  Lines paths;
  for (const auto& match : matches(text, path)) paths.push_back(match[1]);
  return paths;
}

}  // namespace markdown

#endif  // TESTS_MARKDOWN_HPP

-- A document of docs/ as a manual page, for pandoc.
--
-- The first paragraph is what the page is about (NAME). Tables become lists of definitions, which a
-- terminal of any width has room for: the first column is what is defined; of more than two, each cell has
-- the title of its column before it, if that has one. Links to documents that are manual pages name the page;
-- to which others there are links is told at the end, in SEE ALSO.
-- MANUAL_PAGES in the environment says which those are, and MANUAL_PAGE which one this is.

local manual_pages = {}
for document, name, section in os.getenv("MANUAL_PAGES"):gmatch("(%S+)=(%S+)%.(%d)") do
  manual_pages[document] = { name = name, section = section }
end
local this_name, this_section = os.getenv("MANUAL_PAGE"):match("^(.+)%.(%d)$")

local stringify = pandoc.utils.stringify

local function escaped(text)
  return (text:gsub("\\", "\\e"):gsub("-", "\\-"):gsub("'", "\\[aq]"):gsub('"', "\\[dq]"))
end

-- Bold, as manual pages have what is to be typed; pandoc's own font for code is none that mandoc knows.
local function code(element)
  return pandoc.RawInline("man", "\\f[B]" .. escaped(element.text) .. "\\f[R]")
end

local function code_block(element)
  local text = escaped(element.text):gsub("\n%.", "\n\\&."):gsub("^%.", "\\&.")
  return pandoc.RawBlock("man", ".RS 4\n.EX\n" .. text .. "\n.EE\n.RE")
end

local others = {}

local function link(element)
  local document = element.target:match("^([^#:]+%.md)")
  local page = manual_pages[document]
  if document and not page then
    others[document] = true
  end
  if not page or page.name == this_name then
    return element.content
  end
  local name, section = pandoc.Strong { pandoc.Str(page.name) }, "(" .. page.section .. ")"
  if stringify(element.content) == page.name then
    return { name, pandoc.Str(section) }
  end
  return pandoc.List(element.content)
    .. { pandoc.Space(), pandoc.Str("("), name, pandoc.Str(section .. ")") }
end

local function inlines(blocks)
  return pandoc.utils.blocks_to_inlines(blocks)
end

local function definition_list(element)
  local simple = pandoc.utils.to_simple_table(element)
  local items = {}
  for _, row in ipairs(simple.rows) do
    local lines = pandoc.List {}
    for column = 2, #row do
      local cell, title = inlines(row[column]), inlines(simple.headers[column])
      if #cell > 0 then
        if #lines > 0 then
          lines:insert(pandoc.RawInline("man", "\n.br\n"))
        end
        if #row > 2 and #title > 0 then
          lines:extend(title)
          lines:extend { pandoc.Str(":"), pandoc.Space() }
        end
        lines:extend(cell)
      end
    end
    table.insert(items, { inlines(row[1]), { { pandoc.Plain(lines) } } })
  end
  return pandoc.DefinitionList(items)
end

local function name_section(paragraph)
  local sentence = stringify(paragraph):gsub("%.$", "")
  sentence = sentence:sub(1, 1):lower() .. sentence:sub(2)
  return {
    pandoc.Header(1, "NAME"),
    pandoc.Plain { pandoc.Str(this_name .. " - " .. sentence) },
  }
end

local function heading(element)
  element.level = element.level - 1
  if element.level > 1 then
    return element
  end
  return element:walk { Str = function(word) return pandoc.Str(pandoc.text.upper(word.text)) end }
end

-- The document's title goes, and the first paragraph with it; sections of level 2 become those of the page.
-- The paragraph after a heading is none that an empty line comes before.
local function arranged(blocks)
  local arranged_blocks, after_heading = pandoc.List(name_section(blocks[2])), false
  for index = 3, #blocks do
    local block = blocks[index]
    if block.t == "Header" then
      block = heading(block)
    elseif block.t == "Para" and after_heading then
      block = pandoc.Plain(block.content)
    elseif block.t == "RawBlock" and not after_heading then
      arranged_blocks:insert(pandoc.RawBlock("man", ".sp"))
    end
    after_heading = block.t == "Header"
    arranged_blocks:insert(block)
  end
  return arranged_blocks
end

function Pandoc(document)
  local blocks = document.blocks:walk { Link = link }
  blocks = blocks:walk { Code = code, CodeBlock = code_block, Table = definition_list }
  document.blocks = arranged(blocks)
  local names = pandoc.List {}
  for name in pairs(others) do
    names:insert(name)
  end
  names:sort()
  document.blocks:insert(pandoc.Para {
    pandoc.Str("The documentation (on Debian in /usr/share/doc/sessiond): " .. table.concat(names, ", ") .. "."),
  })
  document.meta.title = pandoc.MetaString(this_name:upper())
  -- As it is: escaped hyphens are none of a date's.
  local date = stringify(document.meta.date)
  document.meta.date = pandoc.MetaInlines { pandoc.RawInline("man", date) }
  return document
end

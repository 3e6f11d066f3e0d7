// Shows what a model wrote. Its text only ever becomes text nodes, so that no tag in it can do anything.

// Makes an element. children: elements or strings.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Returns a fragment: fenced code as blocks, `code` and **bold** within lines, everything else as it stands.
export function rendered(text) {
  const fragment = document.createDocumentFragment();
  const fences = /^```([\w+#.-]*)[^\S\n]*\n([\s\S]*?)(?:\n?^```[^\S\n]*$\n?|$(?![\s\S]))/gm;
  let end = 0;
  for (const match of text.matchAll(fences)) {
    fragment.append(...inline(text.slice(end, match.index)));
    fragment.append(make("pre", { tabIndex: 0 }, make("code", {}, match[2])));
    end = match.index + match[0].length;
  }
  fragment.append(...inline(text.slice(end)));
  return fragment;
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, number) => {
    if (number % 2 === 0) return part;
    return part[0] === "`" ? make("code", {}, part.slice(1, -1)) : make("strong", {}, part.slice(2, -2));
  });
}

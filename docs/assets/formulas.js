// Formulas in pages are \( ... \) or \[ ... \] in elements of the class "arithmatex"; KaTeX, kept beside this file, sets them.
// The marks around one stay on its line.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const formula = element.textContent.trim().slice(2, -2);
    katex.render(formula, element, { displayMode: element.tagName === "DIV", throwOnError: true });
    const { previousSibling: before, nextSibling: after } = element;
    const opening = before?.data?.match(/\(?$/)[0] ?? "";
    const closing = after?.data?.match(/^[.,;:?!)]*/)[0] ?? "";
    if (opening || closing) {
      const whole = document.createElement("span");
      whole.className = "formula";
      element.replaceWith(whole);
      whole.append(opening, element, closing);
      if (opening) before.data = before.data.slice(0, -1);
      if (closing) after.data = after.data.slice(closing.length);
    }
  }
  // Results of the search hold text alone.
  const results = document.querySelector("[data-md-component=search-result]");
  new MutationObserver(() => {
    const walker = document.createTreeWalker(results, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) if (/\\\(.*?\\\)/s.test(walker.currentNode.data)) found.push(walker.currentNode);
    for (const text of found) {
      const parts = text.data.split(/\\\((.*?)\\\)/s).map((part, index) => {
        if (index % 2 === 0) return part;
        const element = document.createElement("span");
        katex.render(part, element, { throwOnError: false });
        return element;
      });
      text.replaceWith(...parts);
    }
  }).observe(results, { childList: true, subtree: true });
});

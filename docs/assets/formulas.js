// Formulas in pages are \( ... \) or \[ ... \] in elements of the class "arithmatex"; KaTeX, kept beside this file, sets them.
// The mark that follows one stays on its line.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const formula = element.textContent.trim().slice(2, -2);
    katex.render(formula, element, { displayMode: element.tagName === "DIV", throwOnError: true });
    const after = element.nextSibling;
    const mark = after?.data?.match(/^[.,;:?!)]+/)?.[0];
    if (mark) {
      const whole = document.createElement("span");
      whole.className = "formula";
      element.replaceWith(whole);
      whole.append(element, mark);
      after.data = after.data.slice(mark.length);
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

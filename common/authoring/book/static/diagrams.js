// Draws the mermaid diagrams of a page, in the colours of its theme, and again when the reader changes the theme.

const diagrams = [...document.querySelectorAll("pre.mermaid")].map((element) => ({ element, text: element.textContent }));
const system = window.matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.body.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && system.matches);
}

let drawn = 0;
async function draw() {
  const style = getComputedStyle(document.body);
  const background = style.getPropertyValue("--color-background-primary").trim();
  const themeVariables = { edgeLabelBackground: background, clusterBkg: "transparent", fontSize: style.fontSize };
  mermaid.initialize({ startOnLoad: false, theme: isDark() ? "dark" : "neutral", themeVariables });
  for (const { element, text } of diagrams) {
    const { svg } = await mermaid.render(`diagram-${drawn++}`, text);
    element.innerHTML = svg;
    // On a narrow screen it is moved rather than shrunk: its text stays as large as the text around it.
    const drawing = element.firstElementChild;
    drawing.style.minWidth = drawing.style.maxWidth;
  }
}

draw();
system.addEventListener("change", draw);
new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-theme"] });

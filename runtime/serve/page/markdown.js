// A reply's Markdown as DOM nodes. HTML in it stays text, links are checked by markdown-it, pictures are not loaded.

const parser = window.markdownit({ html: false, linkify: false, breaks: true }).disable("image");
parser.renderer.rules.link_open = (tokens, i, options, env, self) => {
  tokens[i].attrSet("target", "_blank");
  tokens[i].attrSet("rel", "noopener noreferrer");
  return self.renderToken(tokens, i, options);
};

/** Replaces a node's content by rendered Markdown. */
export function renderMarkdown(node, text) {
  node.innerHTML = parser.render(text);
}

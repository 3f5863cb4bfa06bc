// Entry of the page: which of the two views the address asks for.

import { showList } from "./list.js";
import { showRun } from "./run.js";

const root = document.getElementById("content");
const path = location.pathname.match(/^\/runs\/([^/]+)\/?$/);

if (path) showRun(root, decodeURIComponent(path[1]));
else showList(root);

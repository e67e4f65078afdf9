"""GEdit-Bench (arXiv 2504.17761): edits that users asked for, in English and Chinese, judged by VIEScore."""

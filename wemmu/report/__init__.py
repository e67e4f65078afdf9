"""The report kit: renders pages, tables, charts and contact sheets. Free of torch; knows nothing of their content.

A report is a `page.Page` of blocks. `page.html` renders it as one file that loads nothing, `text.as_text` as text.
"""

"""The report kit: how pages, tables, charts and contact sheets look. Free of torch; it does not know what they show.

A report is a `page.Page` of blocks. `page.html` renders it as one file that loads nothing, `text.as_text` as text.
"""

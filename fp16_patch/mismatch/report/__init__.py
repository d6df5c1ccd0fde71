"""What people look at: tables, the page, the live terminal, dumps of other trainers."""

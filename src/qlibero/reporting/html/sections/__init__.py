"""The report's sections, one file each: a function from the gathered material to HTML, or None for nothing to show."""

"""Pictures as SVG; they take arrays and know no run."""

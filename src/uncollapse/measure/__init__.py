"""What is measured of prototypes and projections, and how it is judged; arrays in, numbers out."""

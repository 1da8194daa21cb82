"""What runs show: page, table and verdict, from run folders alone."""
